"""The page of `deltamem page` in a browser: the model runs there, and the memories stay there."""

from __future__ import annotations

import base64
import json
import re
import shutil

import numpy as np
import pytest
from helpers.browser import CHROMIUM, needs_chromium
from helpers.hosting import hosting
from helpers.node import node_modules
from helpers.page_user import CONTRASTS, EMPTY, LEAST_CONTRAST, UNNAMED, using
from helpers.tiny import randomise, tiny_model, tiny_tokenizer
from helpers.web_library import SCRIPTS
from playwright.sync_api import expect

from deltamem_tool import Conversation, DeltaMemConfig, OnnxModel, attach, export_onnx
from deltamem_tool.memory.file import memory_bytes, memory_from_bytes
from deltamem_tool.onnx.contract import DATA_FILE, MANIFEST_FILE
from deltamem_tool.page.build import make_page

pytestmark = [pytest.mark.browser, pytest.mark.node, pytest.mark.slow, needs_chromium]

TELL, ASK, NAME = "My dog is Rex.", "What is the name of my dog?", "Rex"
NARROW = {"width": 390, "height": 844}
TOLERANCE = 1e-4  # of states, to ONNX Runtime's CPU provider
SWIFTSHADER = (
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan",
    "--use-webgpu-adapter=swiftshader",
    "--enable-unsafe-swiftshader",
)
HOLD_LOCK = """name => new Promise((held) => {
  navigator.locks.request(name, () => new Promise((release) => {
    window.releaseLock = release;
    held();
  }));
})"""
STORED = """async name => {
  const request = indexedDB.open("deltamem", 1);
  const database = await new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const all = database.transaction("memories").objectStore("memories").getAll();
  const memories = await new Promise((resolve) => (all.onsuccess = () => resolve(all.result)));
  database.close();
  const memory = memories.find((memory) => memory.name === name);
  return memory ? [memory.version, btoa(String.fromCharCode(...memory.bytes))] : null;
}"""


@pytest.fixture(scope="module")
def sites(web_folder, tmp_path_factory):
    """The page at /one/, and at /two/ that of an adapter that differs only in its name."""
    root = tmp_path_factory.mktemp("sites")
    other = shutil.copytree(web_folder, root / "other")
    manifest = json.loads((other / MANIFEST_FILE).read_text("utf-8"))
    (other / MANIFEST_FILE).write_text(json.dumps({**manifest, "adapter": "f" * 64}), encoding="utf-8")
    packages = node_modules(SCRIPTS)
    make_page(web_folder, root / "one", runtime=packages)
    make_page(other, root / "two", runtime=packages, webgpu=False)
    return root


@pytest.fixture(scope="module")
def host(sites):
    with hosting(sites) as address:
        yield address


@pytest.fixture
def user(browser, host):
    with using(browser, f"{host}/one") as user:
        yield user


def stored(user, name):
    """Version and content of a memory file in the browser."""
    row = user.page.evaluate(STORED, name)
    return row and (row[0], base64.b64decode(row[1]))


def test_what_was_told_is_known_after_a_reload_and_to_no_other_memory(user, web_folder, host):
    asked = set()
    user.page.on("request", lambda request: asked.add(request.url))
    user.open("anna")
    expect(user.page.get_by_text(EMPTY)).to_be_visible()
    told = user.say(TELL)
    conversation = Conversation(OnnxModel(web_folder, threads=1))
    assert told == conversation.generate(TELL).text
    version, content = stored(user, "anna")
    for name, tensor in memory_from_bytes(content, "it").tensors().items():
        np.testing.assert_allclose(tensor, conversation.memory.tensors()[name], rtol=0, atol=TOLERANCE)
    user.reload()
    expect(user.answers).to_have_count(0)
    assert NAME in user.say(ASK)
    assert version == 1 and stored(user, "anna")[0] == 2
    user.page.get_by_label("New memory").fill("bert & <b>")
    user.press("New")
    user.wait("bert & <b>")
    expect(user.answers).to_have_count(0)  # the name may be shown before the other memory's conversation is removed
    assert NAME not in user.say(ASK)
    user.page.get_by_role("link", name="anna").click()
    user.wait("anna")
    expect(user.answers).to_have_count(1)  # its conversation is still shown
    assert {address.partition("/one/")[0] for address in asked if not address.startswith("blob:")} == {host}


@pytest.fixture
def webgpu_browser(browser):
    """A browser with SwiftShader, a WebGPU driver for CPUs that comes with Chromium."""
    with browser.browser_type.launch(executable_path=CHROMIUM, args=list(SWIFTSHADER)) as chromium:
        yield chromium


def test_it_computes_on_webgpu_as_well(webgpu_browser, web_folder, host):
    with using(webgpu_browser, host) as user:
        user.page.goto(f"{host}/one/?provider=webgpu#memory=anna")
        user.wait("anna")
        if not user.page.evaluate("navigator.gpu.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no adapter for WebGPU")
        expect(user.page.locator("#model")).to_have_text("WebGPU")
        conversation = Conversation(OnnxModel(web_folder, threads=1))
        for words in (TELL, ASK):
            assert user.say(words) == conversation.generate(words).text
        for name, tensor in memory_from_bytes(stored(user, "anna")[1], "it").tensors().items():
            np.testing.assert_allclose(tensor, conversation.memory.tensors()[name], rtol=0, atol=TOLERANCE)


def test_it_may_ask_nobody_else_from_its_thread_either(user, host):
    user.open("anna")
    elsewhere = host.replace("127.0.0.1", "localhost")
    ask = "url => fetch(url, { mode: 'no-cors' }).then(() => 'answered', () => 'refused')"
    assert user.page.evaluate(ask, f"{host}/one/index.html") == "answered"
    assert user.page.evaluate(ask, f"{elsewhere}/one/index.html") == "refused"
    (thread,) = user.page.workers
    assert thread.evaluate(ask, f"{host}/one/index.html") == "answered"
    assert thread.evaluate(ask, f"{elsewhere}/one/index.html") == "refused"
    user.problems = [problem for problem in user.problems if "Content Security Policy" not in problem]


def test_undone_saved_forgotten_and_loaded(user, web_folder, tmp_path):
    user.open("dora")
    user.say(TELL)
    first = stored(user, "dora")[1]
    user.say("My dog is Bella.")
    user.undo()
    expect(user.answers).to_have_count(1)
    assert stored(user, "dora")[1] == first
    with user.page.expect_download() as download:
        user.press("Save")
    file = tmp_path / "dora.safetensors"
    download.value.save_as(file)
    conversation = Conversation(OnnxModel(web_folder, threads=1))
    conversation.load_memory(file)
    assert file.read_bytes() == first == memory_bytes(conversation.memory)
    user.reload()
    user.undo()  # from before the reload
    expect(user.summary).to_have_text("Nothing is stored yet.")
    assert stored(user, "dora") is None and NAME not in user.say(ASK)
    user.press("Forget")
    user.page.get_by_role("dialog").get_by_role("button", name="Forget").click()
    user.sees("Forgotten.")
    assert stored(user, "dora") is None
    user.page.locator("#file").set_input_files(file)
    user.sees_version(1)
    assert stored(user, "dora")[1] == first and NAME in user.say(ASK)


def test_files_that_are_not_this_adapters_memory_are_refused(user, web_folder, tmp_path):
    user.open("emil")
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    content = memory_bytes(Conversation(OnnxModel(web_folder, threads=1)).memory)
    adapter = memory_from_bytes(content, "it").adapter.encode()
    other.write_bytes(content.replace(adapter, b"0" * len(adapter)))
    damaged.write_bytes(content[:-1])
    for file, why in ((other, "belongs to another adapter"), (damaged, "is not a memory file")):
        user.page.locator("#file").set_input_files(file)
        user.sees(why)
    assert stored(user, "emil") is None


def test_two_tabs_on_one_memory(user, browser, host):
    user.open("fritz")
    second = user.beside()
    second.open("fritz")
    user.say(TELL)
    second.sees_version(1)
    assert NAME in second.say(ASK)
    user.sees_version(2)
    for tab, words in ((user, "My cat is Bella."), (second, "My parrot is Kiwi.")):  # at once
        tab.words.fill(words)
        tab.words.press("Enter")
    for tab in (user, second):
        expect(tab.answers).to_have_count(2)
        tab.sees_version(4)
    assert stored(user, "fritz")[0] == 4
    second.press("Undo")
    second.sees_version(5)
    user.sees_version(5)


@pytest.fixture
def lock(web_folder):
    """A function that takes the lock of a memory in a tab, as if it were answering there; returns what releases it."""
    adapter = json.loads((web_folder / MANIFEST_FILE).read_text("utf-8"))["adapter"]

    def take(tab, memory):
        tab.page.evaluate(HOLD_LOCK, f"deltamem {adapter} {memory}")
        return lambda: tab.page.evaluate("window.releaseLock()")

    return take


def wait_until(tab, expression):
    """Wait until an expression is true. Playwright's `wait_for_function` would break the page's policy against eval."""
    while not tab.page.evaluate(expression):
        tab.page.wait_for_timeout(10)


def wait_for_waiting(tab, number):
    """Wait until so many tabs wait for a lock."""
    wait_until(tab, f"navigator.locks.query().then(({{ pending }}) => pending.length === {number})")


def test_a_message_that_waits_for_another_tab_is_kept_whatever_is_opened_meanwhile(user, lock):
    user.open("otto")
    second = user.beside()
    second.open("otto")
    free = lock(user, "otto")
    for number, (tab, words) in enumerate(((second, TELL), (user, "My cat is Bella.")), start=1):
        tab.words.fill(words)
        tab.words.press("Enter")
        wait_for_waiting(user, number)
    user.page.goto(user.page.url.replace("otto", "paula"))
    user.wait("paula")
    free()
    second.sees_version(2)
    user.page.go_back()
    user.sees_version(2)
    expect(user.notice).to_be_empty()
    assert stored(user, "otto")[0] == 2


def test_a_message_that_waits_for_another_tab_can_be_stopped(user, lock):
    user.open("quirin")
    second = user.beside()
    second.open("quirin")
    free = lock(second, "quirin")
    user.words.fill(TELL)
    user.words.press("Enter")
    wait_for_waiting(user, 1)
    user.press("Stop")
    user.sees("Stopped. The memory has not changed.")
    free()
    wait_for_waiting(user, 0)
    expect(user.words).to_have_value(TELL)
    assert stored(user, "quirin") is None
    user.say(TELL)
    assert stored(user, "quirin")[0] == 1


def test_undo_that_is_pressed_twice_has_nothing_more_to_undo(user):
    user.open("rita")
    user.say(TELL)
    user.page.evaluate("() => { const undo = document.getElementById('undo'); undo.click(); undo.click(); }")
    expect(user.summary).to_have_text("Nothing is stored yet.")
    assert NAME not in user.say(ASK)


def test_another_memory_is_opened_before_the_first_one_is(user):
    user.open("silke")
    user.page.evaluate("""() => {
      const post = Worker.prototype.postMessage;
      window.held = [];
      Worker.prototype.postMessage = function (message) {
        if (message.call === "begin") window.held.push(() => post.call(this, message));
        else post.call(this, message);
      };
    }""")
    for number, name in enumerate(("tamara", "ulla"), start=1):
        user.page.evaluate("name => (location.hash = `memory=${name}`)", name)
        wait_until(user, f"window.held.length === {number}")
    user.page.evaluate("window.held[0]()")
    expect(user.page.locator("#memories [aria-current]")).to_have_text(re.compile("^ulla"))
    user.page.evaluate("window.held[1]()")
    expect(user.page.get_by_text(EMPTY)).to_be_visible()


def test_a_full_storage_loses_no_memory(user):
    user.open("gina")
    session = user.page.context.new_cdp_session(user.page)
    origin = user.page.evaluate("location.origin")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1})
    user.say(TELL)
    user.sees("The browser's storage is full.")
    expect(user.summary).to_contain_text("not stored")
    assert stored(user, "gina") is None
    with user.page.expect_download():
        user.press("Save")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin})
    assert NAME in user.say(ASK)
    user.sees_version(1)


def test_a_model_that_is_cut_short_is_refused(browser, sites):
    cut = shutil.copytree(sites / "one", sites / "cut")
    content = (cut / "model" / DATA_FILE).read_bytes()
    (cut / "model" / DATA_FILE).write_bytes(content[: len(content) // 2])
    with hosting(cut) as address, using(browser, address) as user:
        user.page.goto(address)
        user.sees(f"{DATA_FILE} is not the expected file. It has {len(content) // 2} of {len(content)} bytes.")
        expect(user.page.locator("main")).to_be_hidden()


def test_the_page_of_another_adapter_does_not_see_the_memories(user, host):
    user.open("hanna")
    user.say(TELL)
    other = user.beside(f"{host}/two")
    other.open("hanna")
    expect(other.page.locator("#memories a")).to_have_count(1)
    expect(other.page.get_by_text(EMPTY)).to_be_visible()
    assert NAME not in other.say(ASK)
    assert NAME in user.say(ASK)


def test_without_a_network_after_the_first_visit(browser, sites):
    with using(browser, "") as user:
        with hosting(sites) as address:
            user.page.goto(f"{address}/one/#memory=ida")
            user.wait("ida")
            user.say(TELL)
            user.page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        user.reload()
        assert NAME in user.say(ASK)


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory):
    """A tiny model whose memory writes by sentence."""
    folder = tmp_path_factory.mktemp("by_sentence") / "onnx"
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity="sentence")))
    export_onnx(model, tokenizer, folder, target="web")
    return folder


def test_an_adapter_that_writes_by_sentence(browser, sentence_folder, tmp_path):
    make_page(sentence_folder, tmp_path / "site", runtime=node_modules(SCRIPTS), webgpu=False)
    conversation = Conversation(OnnxModel(sentence_folder, threads=1))
    with hosting(tmp_path / "site") as address, using(browser, address) as user:
        user.open("piet")
        for words in ("My dog is Rex. My cat is Bella!", "Is Dr. Who a dog? No."):
            assert user.say(words) == conversation.generate(words).text
        for name, tensor in memory_from_bytes(stored(user, "piet")[1], "it").tensors().items():
            np.testing.assert_allclose(tensor, conversation.memory.tensors()[name], rtol=0, atol=TOLERANCE)


def test_everything_can_be_read_and_has_a_name(browser, host):
    with using(browser, f"{host}/one", viewport=NARROW) as user:
        user.open("mia " + "x" * 100)
        user.say(TELL + " " + "x" * 200)
        for scheme in ("light", "dark"):
            user.page.emulate_media(color_scheme=scheme)
            texts = user.page.evaluate(CONTRASTS)
            assert len(texts) > 15
            assert [text for text in texts if text[1] < LEAST_CONTRAST] == []
        assert user.page.evaluate(UNNAMED) == []
        assert user.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


def test_by_keyboard_alone(user):
    user.open("nora")
    expect(user.words).to_be_focused()
    user.page.keyboard.type(TELL)
    user.page.keyboard.press("Enter")
    user.sees_version(1)
    for name in ("Send", "Undo"):
        user.page.keyboard.press("Tab")
        expect(user.button(name)).to_be_focused()
    user.page.keyboard.press("Enter")
    expect(user.summary).to_have_text("Nothing is stored yet.")
