"""docs/web.md: its program is the example, and remembers in Node and in a browser, from a memory file too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, needs_chromium
from helpers.hosting import hosting
from helpers.node import node_folder

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
EXAMPLE, PAGE = DOCS / "examples" / "remember.mjs", DOCS / "examples" / "remember.html"
MAX_LINES = 80
FACT, QUESTION = "By the way, my dog is Bella.", "What is the name of my dog?"
ANSWER = "Your dog is Bella."


def test_the_program_is_the_example_and_short():
    program = EXAMPLE.read_text(encoding="utf-8")
    assert f"```js\n{program}```\n" in (DOCS / "web.md").read_text(encoding="utf-8")
    assert len(program.splitlines()) <= MAX_LINES


def test_the_page_imports_what_the_tests_run():
    tested = json.loads((TESTS / "onnx" / "web" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    imported = dict(re.findall(r"npm/(@?[\w/-]+)@([\d.]+)/dist", PAGE.read_text(encoding="utf-8")))
    assert imported and imported.items() <= tested.items()


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The program, in a folder with its packages."""
    folder = node_folder(TESTS / "onnx" / "web", tmp_path_factory.mktemp("node") / "scripts")
    return Path(shutil.copy(EXAMPLE, folder))


def in_node(script: Path, *arguments: str | Path) -> list[str]:
    return subprocess.run(["node", script, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.node
@pytest.mark.slow
def test_the_program_remembers(example, web_folder):
    assert in_node(example, web_folder, FACT, QUESTION)[1] == ANSWER
    assert in_node(example, web_folder, QUESTION) != [ANSWER]


FROM_A_FILE = """
import { readFile } from "node:fs/promises";
import { answer, load, statesOf } from "./remember.mjs";
const [folder, file, prompt] = process.argv.slice(2);
const model = await load((name) => readFile(`${folder}/${name}`));
const states = statesOf(model, new Uint8Array(await readFile(file)).buffer);
console.log((await answer(model, prompt, states)).text);
"""


@pytest.mark.node
@pytest.mark.slow
def test_it_goes_on_from_a_memory_file(example, web_folder, tmp_path):
    from deltamem_tool import Conversation, OnnxModel
    from deltamem_tool.memory.file import write_memory

    conversation = Conversation(OnnxModel(web_folder))
    conversation.generate(FACT)
    write_memory(tmp_path / "bella.safetensors", conversation.memory)
    script = example.with_name("from_a_file.mjs")
    script.write_text(FROM_A_FILE, encoding="utf-8")
    prompt = f"<|user|>{QUESTION}<|end|><|assistant|>"
    assert in_node(script, web_folder, tmp_path / "bella.safetensors", prompt) == [ANSWER]


SAY = """<script type="module">
  const [form, prompts] = [document.forms[0], PROMPTS];
  setInterval(() => {
    if (form.elements[1].disabled || !prompts.length) return;
    form.words.value = prompts.shift();
    form.requestSubmit();
  }, 10);
</script>"""


@pytest.fixture
def site(example, web_folder, tmp_path):
    """The address of the page, which sends the prompts by itself and gets its packages from npm's folder."""
    root = tmp_path / "site"
    root.mkdir()
    for name, target in (("onnx-web", web_folder), (EXAMPLE.name, EXAMPLE), ("npm", example.with_name("node_modules"))):
        (root / name).symlink_to(target)
    page = re.sub(r"https://cdn[^\"]*/npm/([^\"]*)@[\d.]+/", r"./npm/\1/", PAGE.read_text(encoding="utf-8"))
    (root / "index.html").write_text(page + SAY.replace("PROMPTS", json.dumps([FACT, QUESTION])), encoding="utf-8")
    with hosting(root) as address:
        yield f"{address}/"


@pytest.mark.browser
@pytest.mark.node
@pytest.mark.slow
@needs_chromium
def test_the_page_remembers(site, tmp_path):
    options = ("--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom")
    shown = subprocess.run([CHROMIUM, *options, site], capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"&gt; {QUESTION}\n{ANSWER}\n" in shown
