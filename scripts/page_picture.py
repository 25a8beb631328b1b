"""Take a screenshot of the page of `deltamem serve` after a short conversation, for docs/serving.png.

    deltamem serve builtin:adapter &
    python scripts/page_picture.py docs/serving.png http://127.0.0.1:8000 anna 'My dog is Bella.' 'My parrot is Kiwi.'

The arguments are the address, the name of the memory, and the messages. Needs `pip install playwright`, and Chromium.
"""

from __future__ import annotations

import os
import sys
from urllib.parse import urlencode

from playwright.sync_api import expect, sync_playwright

SIZE = {"width": 1280, "height": 800}


def main() -> None:
    picture, url, memory, *messages = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(f"{url}/#{urlencode({'memory': memory})}")
        for number, message in enumerate(messages, start=1):
            page.get_by_label("Message").fill(message)
            page.get_by_label("Message").press("Enter")
            expect(page.locator(".answer[aria-busy=false]")).to_have_count(number)
            expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.get_by_label("Message").blur()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
