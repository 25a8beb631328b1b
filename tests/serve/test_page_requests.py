"""The page of `deltamem serve` while requests are on their way: two at once, and another memory opened meanwhile."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
from helpers.browser import needs_chromium
from helpers.page_user import using
from playwright.sync_api import expect
from serve.serving import serving

from deltamem_tool.serve.memories import PAGE

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow, needs_chromium]

TELL, ASK, TELL_ANOTHER = "My dog is Rex.", "What is the name of my dog?", "My dog is Bella."


@contextmanager
def holding(user, url):
    """Hold the requests to a URL; yields a list of them."""
    held = []
    user.page.route(url, lambda route: held.append(route))
    yield held
    user.page.unroute(url)


def wait_for(user, held, number):
    while len(held) < number:
        user.page.wait_for_timeout(10)


def test_no_button_changes_a_memory_that_is_not_loaded_yet(user):
    user.open("emil")
    for text in (TELL, TELL_ANOTHER):  # so that there is an earlier version
        user.say(text)
    routes = []
    user.page.route("**/v1/memories/emil", lambda route: routes.append(route))
    user.page.reload()
    expect(user.page.get_by_text("Loading …")).to_be_visible()
    for name in ("Undo", "Load", "Forget"):
        expect(user.button(name)).to_be_disabled()
    with user.page.expect_response("**/v1/memories/emil"):
        routes.pop().continue_()
    expect(user.button("Undo")).to_be_enabled()


def test_a_message_that_is_sent_twice_while_the_memory_loads_is_sent_once(user, server):
    sent = []
    user.page.on("request", lambda request: sent.append(request.url) if "completions" in request.url else None)
    user.open("quinn")
    with holding(user, "**/v1/memories/rosa") as held:
        user.page.goto(f"{user.page.url.partition('#')[0]}#memory=rosa")
        wait_for(user, held, 1)
        user.words.fill(TELL)
        for number in (2, 3):
            user.words.press("Enter")
            wait_for(user, held, number)
        for request in held:
            request.continue_()
    expect(user.summary).to_have_text(re.compile(r"^version \d+,"))
    assert len(sent) == len(server.store.versions("default", "rosa")) == 1


def test_a_message_does_not_go_to_a_memory_that_is_opened_meanwhile(user, server):
    user.open("sam")
    with holding(user, "**/v1/memories/tina") as held:
        user.page.goto(f"{user.page.url.partition('#')[0]}#memory=tina")
        wait_for(user, held, 1)
        user.words.fill(TELL)
        user.words.press("Enter")
        wait_for(user, held, 2)
        user.page.go_back()
        user.wait("sam")
        for request in held:
            with user.page.expect_response("**/v1/memories/tina"):
                request.continue_()
    expect(user.words).to_have_value(TELL)
    assert [server.store.get("default", name) for name in ("sam", "tina")] == [None, None]


def test_a_memory_that_is_restored_while_another_opens_does_not_end_its_conversation(user, server):
    user.open("uma")
    user.say(ASK)
    user.open("vera")  # on the same page, whose conversations last
    for text in (TELL, TELL_ANOTHER):
        user.say(text)
    user.page.get_by_text("Earlier versions").click()
    with holding(user, "**/restore") as held:
        user.press(f"Restore version {server.store.versions('default', 'vera')[-1].version}")
        wait_for(user, held, 1)
        user.page.go_back()
        user.wait("uma")
        with user.page.expect_response("**/v1/memories/uma/versions"):
            held.pop().continue_()
    user.page.go_forward()
    user.wait("vera")
    expect(user.answers).to_have_count(0)
    user.page.go_back()
    user.wait("uma")
    expect(user.answers).to_have_count(1)


def test_the_list_is_that_of_the_memory_that_was_opened_last(user):
    """Neither of the two is stored, so each list shows only its own."""
    user.open("willi")
    address = user.page.url.partition("#")[0]
    with holding(user, "**/v1/memories") as held:
        for number, name in enumerate(("xaver", "yara"), start=1):
            user.page.goto(f"{address}#memory={name}")
            wait_for(user, held, number)
        for request in reversed(held):
            with user.page.expect_response("**/v1/memories"):
                request.continue_()
    user.wait("yara")
    expect(user.page.locator("#memories [aria-current]")).to_have_text(re.compile("^yara"))
    expect(user.page.get_by_role("link", name="xaver")).to_have_count(0)


def test_more_memories_are_shown_once_however_often_the_button_is_pressed(browser, shipped_engine, tmp_path):
    with serving(shipped_engine, tmp_path) as server, using(browser, server.url) as user:
        for number in range(PAGE + 1):
            server.store.put("default", f"memory {number:03}", b"")
        user.open("a new one")
        with holding(user, "**/v1/memories?after=*") as held:
            for number in (1, 2):
                user.press("More")
                wait_for(user, held, number)
            for request in held:
                with user.page.expect_response("**/v1/memories?after=*"):
                    request.continue_()
        expect(user.page.locator("#memories li")).to_have_count(1 + PAGE + 1)


# Messages are text
