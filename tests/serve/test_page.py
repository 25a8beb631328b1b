"""The page of `deltamem serve` in a browser."""

from __future__ import annotations

import hashlib
import re

import anyio
import httpx2
import pytest
from helpers.browser import needs_chromium
from helpers.page_user import CONTRASTS, EMPTY, LEAST_CONTRAST, UNNAMED, using
from playwright.sync_api import expect
from serve.serving import serving

from deltamem_tool.io import web_files
from deltamem_tool.serve.batching.job import QueueFull
from deltamem_tool.serve.keys import ApiKeys
from deltamem_tool.serve.web_page import FOLDER

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow, needs_chromium]

TELL, ASK, NAME = "My dog is Rex.", "What is the name of my dog?", "Rex"
TELL_ANOTHER, ANOTHER = "My dog is Bella.", "Bella"
HTML = "<img src=x onerror=\"alert('said')\">"
NARROW = {"width": 390, "height": 844}


def stored(server, name):
    return server.store.get("default", name)


def versions(server, name):
    return len(server.store.versions("default", name))


def test_what_was_told_is_known_after_a_reload_and_to_no_other_memory(user):
    user.open("anna")
    expect(user.page.get_by_text(EMPTY)).to_be_visible()
    user.say(TELL)
    user.reload()
    expect(user.answers).to_have_count(0)
    assert NAME in user.say(ASK)
    user.page.get_by_label("New memory").fill("bert & <b>")
    user.press("New")
    user.wait("bert & <b>")
    assert NAME not in user.say(ASK)
    user.page.get_by_role("link", name="anna").click()
    user.wait("anna")
    expect(user.answers).to_have_count(1)  # its conversation is still shown
    user.page.go_back()
    user.wait("bert & <b>")


def test_a_conversation_is_in_view_until_a_new_one_is_begun(user, server):
    user.open("carl")
    user.say(TELL)
    user.say(ASK)
    assert versions(server, "carl") == 2
    user.press("New conversation")
    expect(user.answers).to_have_count(0)
    expect(user.page.get_by_text("Earlier ones are only in the memory")).to_be_visible()
    assert NAME in user.say(ASK)


def test_undo_goes_back_turn_by_turn_to_no_memory(user, server):
    user.open("dora")
    for text in (TELL, TELL_ANOTHER, "My parrot is Kiwi."):
        user.say(text)
    digests = [version.digest for version in server.store.versions("default", "dora")]
    user.undo()
    assert stored(server, "dora").digest == digests[1]
    expect(user.answers).to_have_count(2)
    user.undo()
    assert stored(server, "dora").digest == digests[2]
    assert NAME in user.say(ASK)
    user.undo()
    user.undo()
    expect(user.summary).to_have_text("Nothing is stored yet.")
    expect(user.answers).to_have_count(0)
    assert stored(server, "dora") is None
    expect(user.button("Undo")).to_be_disabled()
    assert NAME not in user.say(ASK)


def test_undo_after_a_reload_and_restoring(user, server):
    user.open("elsa")
    user.say(TELL)
    user.say(TELL_ANOTHER)
    user.reload()
    version = stored(server, "elsa").version
    user.undo()
    assert NAME in user.say(ASK)
    user.page.get_by_text("Earlier versions").click()
    user.press(f"Restore version {version}")
    expect(user.answers).to_have_count(0)
    assert ANOTHER in user.say(ASK)


def test_a_fork_goes_on_with_the_conversation_by_itself(user, server):
    user.open("fred")
    user.say(TELL)
    user.press("Fork")
    user.page.get_by_label("Name of the copy").fill("fred 2")
    user.page.keyboard.press("Enter")
    user.wait("fred 2")
    expect(user.answers).to_have_count(1)
    user.say(TELL_ANOTHER)
    assert [versions(server, name) for name in ("fred", "fred 2")] == [1, 2]
    user.open("fred")
    assert NAME in user.say(ASK)


def test_saved_forgotten_and_loaded(user, server, tmp_path):
    user.open("gina")
    user.say(TELL)
    with user.page.expect_download() as download:
        user.press("Save")
    assert download.value.suggested_filename == "gina.safetensors"
    file = tmp_path / "gina.safetensors"
    download.value.save_as(file)
    assert file.read_bytes() == stored(server, "gina").data

    user.press("Forget")
    user.button("Cancel").locator("visible=true").click()
    assert stored(server, "gina") is not None
    user.press("Forget")
    user.page.get_by_role("dialog").get_by_role("button", name="Forget").click()
    user.sees("Forgotten: 1 version deleted.")
    assert stored(server, "gina") is None
    assert NAME not in user.say(ASK)

    user.page.locator("#file").set_input_files(file)
    expect(user.answers).to_have_count(0)
    assert NAME in user.say(ASK)


def test_a_file_that_is_not_a_memory_is_refused(user, server, tmp_path):
    user.open("hugo")
    user.say(TELL)
    (tmp_path / "bad.safetensors").write_bytes(b"no memory")
    user.page.locator("#file").set_input_files(tmp_path / "bad.safetensors")
    user.sees("is not a memory file")
    assert versions(server, "hugo") == 1


# Several things at once


def test_html_that_is_said_is_text(user):
    user.open(HTML)
    user.say(HTML)
    expect(user.page.locator("#log .user p")).to_have_text(HTML)
    expect(user.page.locator("main img")).to_have_count(0)
    user.reload()
    expect(user.page.get_by_role("link", name="<img src=x")).to_be_visible()


def test_html_that_a_model_says_is_text(user):
    chunk = '{"choices": [{"delta": {"content": %s}, "finish_reason": %s}], "deltamem": {"messages_written": 0}}'
    content = '"' + HTML.replace('"', '\\"') + '"'
    events = [chunk % (content, "null"), chunk % ('""', '"stop"'), "[DONE]"]
    body = "".join(f"data: {event}\n\n" for event in events)
    user.page.route("**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    user.open("ines")
    assert user.say("Hello.") == HTML
    expect(user.page.locator("main img")).to_have_count(0)


def test_the_browser_is_told_to_run_nothing_else(server):
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    folders = (FOLDER, web_files.PARTS, web_files.library())
    for path in ["", *(f"page/{file.name}" for folder in folders for file in folder.iterdir())]:
        response = httpx2.get(f"{server.url}/{path}")
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert httpx2.get(f"{server.url}/page/..%2Fapp.py").status_code == 404


# Errors


def test_a_server_with_keys_asks_for_one(browser, shipped_engine, tmp_path):
    keys = ApiKeys([(tenant, hashlib.sha256(f"key-{tenant}".encode()).hexdigest()) for tenant in ("one", "two")])
    with serving(shipped_engine, tmp_path, keys=keys) as server, using(browser, server.url) as user:
        user.page.goto(server.url)
        user.sees("This server requires an API key.")
        expect(user.words).to_be_hidden()
        user.page.get_by_label("API key").fill("key-three")
        user.press("Use")
        user.sees("The API key is wrong.")
        user.page.get_by_label("API key").fill("key-one")
        user.press("Use")
        user.wait("me")
        expect(user.notice).to_be_empty()
        user.say(TELL)
        user.reload()
        assert NAME in user.say(ASK)
        user.press("Forget the key")
        user.page.get_by_label("API key").fill("key-two")
        user.press("Use")
        user.wait("me")
        assert NAME not in user.say(ASK)
        assert [server.store.usage(tenant).memories for tenant in ("one", "two")] == [1, 1]


def test_a_busy_server(user, server, monkeypatch):
    user.open("jens")

    def full(job):
        raise QueueFull("Too many requests are waiting.", "", "Try again soon.")

    with monkeypatch.context() as patched:
        patched.setattr(server.scheduler, "submit", full)
        user.words.fill(TELL)
        user.press("Send")
        user.sees("Too many requests are waiting. Try again soon.")
    expect(user.words).to_have_value(TELL)
    expect(user.answers).to_have_count(0)
    user.press("Send")
    expect(user.summary).to_contain_text("version")
    expect(user.notice).to_be_empty()


def test_a_server_that_is_gone(browser, shipped_engine, tmp_path):
    with using(browser, "http://none") as user:
        with serving(shipped_engine, tmp_path) as server:
            user.page.goto(server.url)
            user.wait("me")
            user.say(TELL)
        user.words.fill(ASK)
        user.press("Send")
        user.sees("The server cannot be reached.")
        expect(user.words).to_have_value(ASK)
        expect(user.answers).to_have_count(1)
        user.press("Undo")
        user.sees("The server cannot be reached.")


class Endless:
    """An answer that does not end."""

    cancelled = False

    async def __aiter__(self):
        yield "And so"
        await anyio.sleep_forever()

    def cancel(self):
        self.cancelled = True


def test_an_answer_is_stopped(user, server, monkeypatch):
    user.open("karl")
    user.say(TELL)
    ticket = Endless()
    monkeypatch.setattr(server.scheduler, "submit", lambda job: ticket)
    user.words.fill(TELL_ANOTHER)
    user.press("Send")
    expect(user.answers.nth(1).locator("p")).to_have_text("And so")
    expect(user.button("Undo")).to_be_disabled()
    user.press("Stop")
    user.sees("Stopped. The memory has not changed.")
    expect(user.words).to_have_value(TELL_ANOTHER)
    expect(user.answers).to_have_count(1)
    expect(user.button("Undo")).to_be_enabled()
    assert ticket.cancelled and versions(server, "karl") == 1


def test_another_memory_is_opened_while_one_answers(user, server, monkeypatch):
    user.open("olga")
    user.say(TELL_ANOTHER)
    user.open("paul")
    with monkeypatch.context() as patched:
        patched.setattr(server.scheduler, "submit", lambda job: Endless())
        user.words.fill(TELL)
        user.press("Send")
        expect(user.answers.nth(0).locator("p")).to_have_text("And so")
        user.page.get_by_role("link", name="olga").click()
        user.wait("olga")
        expect(user.answers).to_have_count(1)
        expect(user.button("Forget")).to_be_disabled()
        user.press("Stop")
        user.sees("Stopped. The memory has not changed.")
    expect(user.words).to_have_value("")
    assert ANOTHER in user.say(ASK)
    assert stored(server, "paul") is None and versions(server, "olga") == 2


def test_a_memory_that_somebody_else_changed_is_not_undone_unseen(user, server):
    user.open("lisa")
    user.say(TELL)
    user.say(TELL_ANOTHER)
    first = server.store.versions("default", "lisa")[-1].version
    restored = server.store.restore("default", "lisa", first).version
    user.press("Undo")
    user.sees("The memory is not in the state that the request expects.")
    user.sees_version(restored)
    assert stored(server, "lisa").version == restored


# Accessibility


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(browser, server, scheme):
    with using(browser, server.url, color_scheme=scheme, viewport=NARROW) as user:
        user.open(f"mia {scheme} " + "x" * 100)
        user.say(TELL + " " + "x" * 200)
        user.say(TELL)
        user.page.get_by_text("Earlier versions").click()
        user.page.locator("#file").set_input_files(web_files.PARTS / "icon.svg")  # a notice
        user.sees("is not a memory file")
        texts = user.page.evaluate(CONTRASTS)
        assert len(texts) > 20
        assert [text for text in texts if text[1] < LEAST_CONTRAST] == []
        assert user.page.evaluate(UNNAMED) == []
        assert user.page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]


def test_by_keyboard_alone(user, server):
    user.open("nora")
    expect(user.words).to_be_focused()
    keyboard = user.page.keyboard
    keyboard.type("My dog")
    keyboard.press("Shift+Enter")
    keyboard.type("is Rex.")
    keyboard.press("Enter")
    expect(user.page.locator("#log .user p")).to_have_text("My dog\nis Rex.", use_inner_text=True)
    expect(user.summary).to_contain_text("version")
    expect(user.words).to_be_focused()
    reached = set()
    for _ in range(40):
        keyboard.press("Tab")
        reached.add(user.page.evaluate("document.activeElement.id"))
    assert {"new-name", "begin", "log", "words", "send", "undo", "fork", "save", "load", "forget"} <= reached
