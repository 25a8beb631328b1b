"""Measure a page: its size, its loading time, and its speed compared with ONNX Runtime on one thread.

Command: python benchmarks/web_page.py FOLDER... --node-modules DIR [--prompt 128] [--decoded 32] [--repeats 3]
    [--out FILE.md]

FOLDER is a result of `deltamem export --target web`, and DIR is npm's node_modules with the packages of
`web/package.json`. A headless Chromium opens the page that `deltamem page` creates: cold, with nothing cached, and
warm, when it is loaded again. Both are the time until the first answer is complete, from a host on this machine, as
wall-clock time and (in brackets) CPU time of the browser's processes, which other work hardly affects. Speed is CPU
time, in Node and in Python, of the same calls: a prompt, and single tokens after it. Both sides take turns, and the
medians count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
from playwright.sync_api import sync_playwright

from deltamem_tool import OnnxModel
from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.io import web_files
from deltamem_tool.page.build import make_page
from deltamem_tool.page.runtime import PACKAGES

MEGABYTE = 10**6
ROUNDS = 3  # in which both sides are measured
TIMEOUT = 600_000  # milliseconds, of one answer
FIRST = "My dog is Rex."


def seconds_in_node(folder: Path, node_modules: Path, *numbers: int) -> dict[str, float]:
    """Return the median of each measurement in WebAssembly."""
    with tempfile.TemporaryDirectory() as scripts:
        shutil.copytree(web_files.library(), Path(scripts, "src"))
        shutil.copy(Path(__file__).with_name("web_speed.mjs"), scripts)
        Path(scripts, "node_modules").symlink_to(node_modules.resolve())
        command = ["node", "web_speed.mjs", folder.resolve(), *map(str, numbers)]
        done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    times = json.loads(done.stdout)
    return {name: statistics.median(times[name]) for name in ("prompt", "token")} | {"first": times["first"]}


def seconds_native(folder: Path, prompt: int, decoded: int, repeats: int) -> dict[str, float]:
    """Return the same in ONNX Runtime."""
    model = OnnxModel(folder, threads=1)
    ids = np.arange(prompt)[None] % 100
    times: dict[str, list[float]] = {"prompt": [], "token": []}

    def step(past, ids, length):
        ends = np.zeros(ids.shape, bool) if model.memory_shape.segment_width else None
        mask = np.ones((1, length + ids.shape[1]), np.int64)
        return model.step(past, ids, mask, np.ones(ids.shape, bool), ends)[1]

    for repeat in range(repeats + 1):
        begin = time.process_time()
        past = step(model.start(empty_memory(model)), ids, 0)
        between = time.process_time()
        for count in range(decoded):
            past = step(past, ids[:, :1], prompt + count)
        end = time.process_time()
        if repeat:
            times["prompt"].append(between - begin)
            times["token"].append((end - between) / decoded)
    return {name: statistics.median(each) for name, each in times.items()}


class Quiet(SimpleHTTPRequestHandler):
    """A handler that does not log requests."""

    def log_message(self, format, *arguments):
        pass


def processor_seconds() -> float:
    """Return the CPU time of the running child processes."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def waits(site: Path) -> list[tuple[float, float]]:
    """Return the seconds until the first answer is complete, as wall-clock and CPU time, cold and warm."""
    handler = partial(Quiet, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page()
        found = []
        for visit in (lambda: page.goto(f"http://127.0.0.1:{server.server_port}/"), page.reload):
            begin, of_processor = time.perf_counter(), processor_seconds()
            visit()
            page.locator("#words").wait_for(timeout=TIMEOUT)
            page.fill("#words", FIRST)
            page.press("#words", "Enter")
            page.locator("#log .answer[aria-busy=false]").wait_for(timeout=TIMEOUT)
            found.append((time.perf_counter() - begin, processor_seconds() - of_processor))
        browser.close()
        server.shutdown()
    return found


def lines(folders: list[Path], node_modules: Path, prompt: int, decoded: int, repeats: int):
    """Yield the lines of the report."""
    web_version = next(package.version for package in PACKAGES if package.name == "onnxruntime-web")
    yield f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__} and onnxruntime-web {web_version}, one thread each."
    yield ""
    calls = (
        f"prompt of {prompt}, wasm / native | per token, wasm / native | first {decoded} | tokens per second in wasm"
    )
    yield f"| | model | page | first answer, cold | warm | {calls} | of native |"
    yield f"|{'---|' * 10}"
    for folder in folders:
        with tempfile.TemporaryDirectory() as made:
            result = make_page(folder, Path(made, "site"), runtime=node_modules)
            found = waits(result.path)
            rounds = [
                (
                    seconds_in_node(result.path / "model", node_modules, prompt, decoded, repeats),
                    seconds_native(folder, prompt, decoded, repeats),
                )
                for _ in range(ROUNDS)
            ]
        web, native = (
            {name: statistics.median(times[name] for times in side) for name in side[0]}
            for side in zip(*rounds, strict=True)
        )
        cells = (
            folder.name,
            f"{result.model_bytes / MEGABYTE:.1f} MB",
            f"{result.bytes / MEGABYTE:.1f} MB",
            *(f"{clock:.1f} s ({of_processor:.1f})" for clock, of_processor in found),
            *(f"{web[name] * 1e3:.2f} / {native[name] * 1e3:.2f} ms" for name in ("prompt", "token")),
            f"{web['first'] * 1e3:.1f} ms",
            f"{1 / web['token']:.0f}",
            f"{native['token'] / web['token']:.2f}×",
        )
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--node-modules", type=Path, required=True)
    for name, default in (("prompt", 128), ("decoded", 32), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = []
    for line in lines(args.folders, args.node_modules, args.prompt, args.decoded, args.repeats):
        print(line, flush=True)
        report.append(line)
    if args.out:
        args.out.write_text("\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
