"""The pages of `deltamem serve` and `deltamem page` in Chromium, operated like by a user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote_plus

from playwright.sync_api import Browser, Locator, Page, expect

expect.set_options(timeout=60_000)  # a machine may be busy with other tests
EMPTY = "This memory is empty."
LEAST_CONTRAST = 4.5  # of WCAG 2.2, AA
# Every visible text with its contrast to the background, and the controls without a name.
CONTRASTS = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const [r, g, b, alpha = 1] = parse(getComputedStyle(element).backgroundColor);
    return alpha || !element.parentElement ? [r, g, b] : ground(element.parentElement);
  };
  const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && !element.disabled && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((element) => {
    const pair = [parse(getComputedStyle(element).color), ground(element)].map(light).sort((a, b) => b - a);
    return [element.textContent, (pair[0] + 0.05) / (pair[1] + 0.05)];
  });
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, a, canvas")]
  .filter((element) => !(element.labels?.length || element.ariaLabel || element.textContent.trim()))
  .map((element) => element.outerHTML)"""


class User:
    """A user of the page.

    Args:
        page: Playwright's.
        url: the server's.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page, self._url = page, url
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: self._logged(message.type, message.text))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}") or dialog.dismiss())

    def _logged(self, kind: str, text: str) -> None:
        if kind == "error" and not text.startswith("Failed to load resource"):  # an answer of the server
            self.problems.append(text)

    def beside(self, url: str | None = None) -> User:
        """Another tab of the same browser, at another address if there is one."""
        other = User(self.page.context.new_page(), self._url if url is None else url)
        other.problems = self.problems
        return other

    def open(self, memory: str) -> None:
        """Go to the page of a memory, and wait until it is shown."""
        self.page.goto(f"{self._url}/#memory={quote_plus(memory)}")
        self.wait(memory)

    def wait(self, memory: str) -> None:
        """Wait until a memory is shown."""
        expect(self.page.locator("#name")).to_have_text(memory)
        expect(self.page.get_by_text("Loading …")).to_have_count(0)

    def reload(self) -> None:
        """Load the page again, and wait until its memory is shown."""
        self.page.reload()
        expect(self.summary).not_to_be_empty()
        expect(self.page.get_by_text("Loading …")).to_have_count(0)

    def say(self, text: str) -> str:
        """Send a message, and return the answer to it."""
        number = self.answers.count()
        self.words.fill(text)
        self.words.press("Enter")
        expect(self.answers).to_have_count(number + 1)
        answer = self.answers.nth(number)
        expect(answer).to_have_attribute("aria-busy", "false")
        expect(self.button("Send")).to_be_visible()
        version = re.search(r"version (\d+)", answer.locator("small").inner_text())
        if version:
            self.sees_version(int(version[1]))
        return answer.locator("p").inner_text()

    def press(self, name: str) -> None:
        """Press a button."""
        self.button(name).click()

    def undo(self) -> None:
        """Undo, and wait until it is done."""
        before = self.summary.inner_text()
        self.press("Undo")
        expect(self.summary).not_to_have_text(before)

    def sees_version(self, version: int) -> None:
        """Wait until a version is shown."""
        expect(self.summary).to_have_text(re.compile(rf"^version {version},"))

    def sees(self, text: str) -> None:
        """Wait until the notice says it."""
        expect(self.notice).to_contain_text(text)

    def button(self, name: str) -> Locator:
        """The button of that name."""
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def words(self) -> Locator:
        """The field for a message."""
        return self.page.get_by_label("Message")

    @property
    def summary(self) -> Locator:
        """The version of the memory that the page shows."""
        return self.page.locator("#summary")

    @property
    def answers(self) -> Locator:
        """The answers that are shown."""
        return self.page.locator("#log .answer")

    @property
    def notice(self) -> Locator:
        """The notice that the page shows."""
        return self.page.get_by_role("alert")


@contextmanager
def using(browser: Browser, url: str, **options) -> Iterator[User]:
    """A new browser window; the page must not have failed in it."""
    context = browser.new_context(**options)
    try:
        user = User(context.new_page(), url)
        yield user
        assert user.problems == [], user.problems
    finally:
        context.close()
