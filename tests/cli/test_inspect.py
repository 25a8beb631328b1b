"""`deltamem inspect` on memory files: it prints what they hold, and rejects files that cannot be compared."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.tiny import listing

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.memory import plot as memory_picture
from deltamem_tool.memory.file import StoredMemory, write_memory
from deltamem_tool.onnx.contract import MANIFEST_FILE, REQUIRED_FILES, Interface, Layer
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.signature_table import rows

ADAPTER = "0123456789abcdef" * 4


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def written(name, seed=0, layers=(0, 3), batch=2, heads=2, rank=4, adapter=ADAPTER, open_tokens=None):
    """A memory file with random states; with `open_tokens`, of an adapter that writes by segments."""
    rng = np.random.default_rng(seed)
    shape = (batch, heads, rank, rank)
    states = {layer: rng.normal(size=shape).astype(np.float32) for layer in layers}
    segments = {}
    if open_tokens is not None:
        sums = rng.normal(size=(batch, 5)).astype(np.float32)
        sums[:, -1] = open_tokens
        segments = dict.fromkeys(layers, sums)
    write_memory(name, StoredMemory(states, segments, adapter))
    return states


def norms(states):
    return np.sqrt((states.astype(np.float64) ** 2).sum(axis=(2, 3)))


@pytest.fixture
def figures(monkeypatch):
    """The figures that a command saves."""
    figures, write = [], memory_picture.write_picture

    def keep(figure, path, dpi):
        figures.append(figure)
        write(figure, path, dpi)

    monkeypatch.setattr(memory_picture, "write_picture", keep)
    return figures


def panels(figure):
    """Numbers by block and panel, as they were drawn."""
    return {
        axes.get_label(): {image.get_label(): image.get_array() for image in axes.images}
        for axes in figure.axes
        if axes.images
    }


def words(figure):
    texts = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.title))]
    return " ".join(text.get_text() for text in texts)


def test_a_memory_is_printed_as_json(working_folder, deltamem):
    states = written("memory", open_tokens=[3, 0])
    report = json.loads(deltamem("inspect", "memory", "--json").out)
    numbers = {str(layer): norms(state).tolist() for layer, state in states.items()}
    assert {name: np.round(values, 9).tolist() for name, values in report.pop("norms").items()} == {
        name: np.round(values, 9).tolist() for name, values in numbers.items()
    }
    assert report == {
        "kind": "memory",
        "adapter": ADAPTER,
        "conversations": 2,
        "layers": [0, 3],
        "state_heads": 2,
        "rank": 4,
        "bytes": 2 * (2 * 2 * 4 * 4 + 2 * 5) * 4,
        "open_tokens": [3, 0],
    }
    written("token")
    assert json.loads(deltamem("inspect", "token", "--json").out)["open_tokens"] is None


def test_a_memory_is_printed_as_text(working_folder, deltamem):
    states = written("a [red] memory", open_tokens=[3, 0])
    for row in (0, 1):
        result = deltamem("inspect", "a [red] memory", "--row", row)
        assert result.code == 0 and result.err == ""
        assert all(word in result.out for word in ("a [red] memory", ADAPTER[:16] + "…", "0, 3", "3, 0", "head 1"))
        assert f"Norms, conversation {row}" in result.out
        assert all(f"{norm:.4g}" in result.out for state in states.values() for norm in norms(state)[row])
    written("token")
    assert "open tokens" not in deltamem("inspect", "token").out


def test_a_difference_is_printed_as_json(working_folder, deltamem):
    before, after = written("before", open_tokens=[3, 0]), written("after", seed=1, open_tokens=[0, 7])
    report = json.loads(deltamem("inspect", "before", "after", "--json").out)
    assert report["kind"] == "difference" and (report["before"], report["after"]) == ("before", "after")
    assert report["open_tokens"] == {"before": [3, 0], "after": [0, 7]} and "norms" not in report
    assert list(report["changes"]) == ["0", "3"]
    for layer, old in before.items():
        change = norms(after[layer].astype(np.float64) - old)
        expected = {"before": norms(old), "after": norms(after[layer]), "difference": change}
        expected["relative"] = change / norms(old)
        assert set(report["changes"][str(layer)]) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(report["changes"][str(layer)][name], value, rtol=1e-12, err_msg=name)


def test_a_difference_is_printed_as_text(working_folder, deltamem):
    before, after = written("before", open_tokens=[3, 0]), written("after", seed=1, open_tokens=[0, 7])
    result = deltamem("inspect", "before", "after", "--row", 1)
    assert result.code == 0 and all(
        word in result.out for word in ("before → after", "3 → 0, 0 → 7", "relative change")
    )
    for layer, old in before.items():
        share = norms(after[layer] - old)[1] / norms(old)[1]
        assert all(f"{value:.1%}" in result.out for value in share)


def test_there_is_no_relative_change_from_zero(working_folder, deltamem):
    shape = (1, 1, 2, 2)
    write_memory("zero", StoredMemory({0: np.zeros(shape, np.float32)}, {}, ADAPTER))
    write_memory("large", StoredMemory({0: np.full(shape, np.finfo(np.float32).max)}, {}, ADAPTER))
    result = deltamem("inspect", "zero", "large", "--json")
    assert "Warning" not in result.err
    change = json.loads(result.out)["changes"]["0"]
    assert change["relative"] == [[None]] and change["before"] == [[0.0]]
    assert change["difference"] == [[2 * float(np.finfo(np.float32).max)]]
    assert "–" in deltamem("inspect", "zero", "large").out
    back = json.loads(deltamem("inspect", "large", "zero", "--json").out)["changes"]["0"]
    assert back["relative"] == [[1.0]] and back["after"] == [[0.0]]


@pytest.mark.parametrize("row", [None, 1])
def test_pictures_show_the_requested_conversation(working_folder, deltamem, figures, row):
    before, after = written("before"), written("after", seed=1)
    which = () if row is None else ("--row", row)
    result = deltamem("inspect", "before", "--plot", "memory.png", *which)
    assert result.code == 0 and "Plot: memory.png" in result.out
    assert deltamem("inspect", "before", "after", "--plot", "difference.png", "--json", *which).code == 0
    one, two = figures
    ((shown),) = panels(one).values()
    difference = panels(two)
    assert list(difference) == ["before", "after", "after − before"]
    for layer, old in before.items():
        for head in range(2):
            name, place = f"layer {layer}, head {head}", (row or 0, head)
            assert np.array_equal(shown[name], old[place])
            assert np.array_equal(difference["before"][name], old[place])
            assert np.array_equal(difference["after"][name], after[layer][place])
            change = after[layer][place].astype(np.float64) - old[place]
            assert np.array_equal(difference["after − before"][name], change)
    assert "Memory: before" in words(one) and f"conversation {row or 0} of 2" in words(one)
    assert "Difference: from before to after" in words(two)
    assert all((working_folder / name).read_bytes().startswith(b"\x89PNG") for name in ("memory.png", "difference.png"))
    assert set(listing(working_folder)) == {"before", "after", "memory.png", "difference.png"}


def test_a_row_out_of_range_is_rejected(working_folder, deltamem):
    written("memory")
    before = listing(working_folder)
    result = deltamem("inspect", "memory", "--row", 2, "--plot", "memory.png")
    result.assert_short_error("--row", "memory has conversations 0 to 1", code=2)
    deltamem("inspect", "memory", "--row", -1).assert_short_error("--row", code=2)
    assert listing(working_folder) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"adapter": "fedcba" * 10},
            ["other was not written by the adapter that wrote memory", "fedcba", ADAPTER[:16]],
        ),
        ({"layers": (0, 1)}, ["not written by the adapter", "layers are [0, 1], the adapter's [0, 3]"]),
        ({"heads": 1}, ["not written by the adapter", "state heads 1, the adapter's 2"]),
        ({"rank": 3}, ["not written by the adapter", "rank 3, the adapter's 4"]),
        ({"open_tokens": 1}, ["not written by the adapter", "5 numbers of an open segment"]),
        ({"batch": 3}, ["different batch sizes", "other has 3 conversations, memory 2"]),
    ],
)
def test_memories_that_cannot_be_compared_are_rejected(working_folder, deltamem, change, says):
    written("memory")
    written("other", **change)
    before = listing(working_folder)
    result = deltamem("inspect", "memory", "other", "--plot", "difference.png")
    result.assert_short_error(*says, "Compare two memories", code=1)
    assert listing(working_folder) == before


def test_an_adapter_is_printed_as_text(working_folder, deltamem):
    """Options have the names that `deltamem patch` gives them, and unknown values are left out."""
    shown = deltamem("inspect", "builtin:adapter").out
    assert "mechanism.branches" in shown and "q, o" in shown and "mechanism.heads" not in shown and "None" not in shown
    document = json.loads(deltamem("inspect", "builtin:adapter", "--json").out)
    assert document["mechanism"]["heads"] == ["q", "o"]
    fingerprint = read_adapter("builtin:adapter").fingerprint  # to compare with a memory's
    assert document["fingerprint"] == fingerprint and fingerprint[:32] in shown


def test_an_onnx_folder_fits_a_narrow_terminal(working_folder, deltamem, monkeypatch):
    """No name, size or word of the graph's tensors is cut or wrapped in its middle."""
    monkeypatch.setenv("COLUMNS", "80")
    interface = Interface("last", 151_936, "float32", 25, (Layer((8, 128), (8, 128), (1, 8, 8)),) * 36)
    manifest = Manifest(ADAPTER, {}, "base", "qwen3", "cpu", "none", None, interface, 1e-5, None, {})
    for name in REQUIRED_FILES:
        (working_folder / name).write_text(manifest.to_json() if name == MANIFEST_FILE else "")
    shown = deltamem("inspect", ".").out
    words = {word for line in shown.splitlines() for word in line.replace("│", " ").split()}
    for row in rows(interface):
        shape = f"[{', '.join(map(str, row.shape))}]"
        assert {row.name, row.type, *shape.split(), *row.meaning.split()} <= words, row


def test_an_adapter_has_no_rows_and_no_picture(working_folder, deltamem, checkpoint):
    assert deltamem("patch", checkpoint, "--out", "adapter").code == 0
    written("memory")
    before = listing(working_folder)
    for name in ("adapter", "nowhere"):
        for options, says in (
            (("memory",), "OTHER"),
            (("--plot", "a.png"), "--plot"),
            (("--row", 0), "--row"),
            (("memory", "--plot", "a.png"), "OTHER, --plot"),
        ):
            deltamem("inspect", name, *options).assert_short_error(f"{says}: only for", f"{name} is not a file", code=2)
    deltamem("inspect", "memory", "adapter").assert_short_error("adapter is not a memory file", code=1)
    assert listing(working_folder) == before


def test_an_unknown_picture_format_is_rejected_before_reading(working_folder, deltamem):
    for arguments in (("inspect", "missing"), ("eval", "missing", "--out", "a.json")):
        (working_folder / "missing").write_text("not what it should be")
        deltamem(*arguments, "--plot", "a.xyz").assert_short_error(
            "a.xyz", "format .xyz is not supported", ".png, .svg", code=1
        )
    assert listing(working_folder).keys() == {"missing"}


def test_pictures_do_not_replace_the_memory(working_folder, deltamem):
    written("memory")
    written("other")
    (working_folder / "file").write_text("mine")
    before = listing(working_folder)
    for name in ("memory", "./other"):
        result = deltamem("inspect", "memory", "other", "--plot", name)
        result.assert_short_error("is the memory file itself", "another file", code=1)
    deltamem("inspect", "memory", "--plot", "file/a.png").assert_short_error("is not a folder", code=1)
    assert listing(working_folder) == before


@pytest.mark.parametrize("plot", [(), ("--plot", "a.png")])
def test_memories_are_inspected_without_torch(working_folder, plot):
    written("memory")
    written("other", seed=1)
    code = (
        "import sys; from deltamem_tool.cli import main\n"
        f"sys.argv = ['deltamem', 'inspect', 'memory', 'other', *{plot}]\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "onnxruntime", "huggingface_hub"} | (set() if plot else {"matplotlib"})
    assert not heavy & set(result.stdout.splitlines()[-1].split())
