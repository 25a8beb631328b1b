"""A report shows the figures of its evaluation, loads nothing from elsewhere, and escapes all answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from evaluation.reported import evaluation_of, report_folder
from rich.console import Console

from deltamem_tool import DeltaMemConfig, __version__
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.cli.command_line import command_line
from deltamem_tool.cli.evaluate import command
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import Condition
from deltamem_tool.evaluation.report.drawing import DARK, scores_figure, styles, svg
from deltamem_tool.evaluation.report.evaluation_file import read_evaluation
from deltamem_tool.evaluation.report.page import FILES, check_folder
from deltamem_tool.evaluation.report.tables import score_table
from deltamem_tool.evaluation.report.templating import MAX_SHOWN
from deltamem_tool.evaluation.run_info import without_folders
from deltamem_tool.evaluation.scoring.statistics import p_value_text

EVIL = (
    "<script>alert(1)</script><img src=//evil.example/x onerror=alert(2)></style></title></table>\"'>"
    "<a href=javascript:alert(3)>[x](javascript:alert(4)) `x` | {{ 7 * 7 }} {% raw %} &lt; \ud83d $x$"
)
EMPTY = {"meta", "link", "img", "br", "hr", "input", "use", "path"}


class Page(HTMLParser):
    """The elements of a page in order, its text, and the text of its table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.open = "", []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> Page:
    return Page((folder / "index.html").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return report_folder(tmp_path_factory.mktemp("reports") / "usual", evaluation_of(metrics=("exact", "f1")))


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    """A report with markup in every text that comes from a task or a model."""
    groups = (f"<b>{EVIL}", "multi | hop")
    conditions = [Condition("state", "own", "nothing", EVIL), Condition("<i>lora</i>", None, "nothing", "a | b")]
    evaluation = evaluation_of(groups=groups, conditions=conditions, answer=EVIL)
    run = {"created": "2026-01-02T03:04:05+00:00", "command": ["deltamem", EVIL], "options": {"<u>": EVIL}}
    return report_folder(tmp_path_factory.mktemp("reports") / "hostile", evaluation, run=run)


def test_the_page_shows_the_figures_of_the_json(folder):
    evaluation, page = read_evaluation(folder / "evaluation.json"), page_of(folder)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    scores = {row[0]: row[1:] for row in page.rows if row and "to" in row[-1]}
    for name in ("state", "donor_state"):
        (mean, low, high), by_group = evaluation["overall"][name], evaluation["scores"][name]
        shown = next(row for row in page.rows if row[0] == name.replace("_", " ") and len(row) == 4)
        assert shown[1:] == [f"{a:.2f}{b:.2f} to {c:.2f}" for a, b, c in ([mean, low, high], *by_group)]
    assert evaluation["overall"]["state"][0] == 0.75 and scores
    over = evaluation["differences"]["zero_state"]
    shown = next(row for row in page.rows if row[0] == "zero state" and row[1].startswith("+"))
    assert shown[1].startswith(f"+{over['mean']:.2f}") and shown[2:] == [p_value_text(over["p_value"], 10), "10"]
    assert all(f"{line[0].upper()}{line[1:]}." in page.text for line in evaluation["verdict"])
    assert evaluation["group_differences"]["2 facts"]["donor_state"]["histories"] == 10
    assert evaluation["other_metrics"] == {"f1": evaluation["overall"]} and evaluation["other_scores"] == {
        "f1": evaluation["scores"]
    }
    of_states = [row for row in page.rows if row[0] == "state" and len(row) == 4]
    assert len(of_states) == 2 and of_states[0] == of_states[1], "f1 has a table by group too"
    markdown = (folder / "report.md").read_text()
    assert "| state | 0.75 (" in markdown and evaluation["verdict"][0][4:] in markdown


def test_a_margin_is_in_the_figures_and_on_the_page(tmp_path):
    """The state is right three times in four: this exceeds zeros by a margin of 0.2, and is undecided for 0.6."""
    for margin, place, words in ((0.2, "beyond", "more than"), (0.6, "undecided", "which may be within")):
        folder = report_folder(tmp_path / place, replace(evaluation_of(), margin=margin))
        evaluation = read_evaluation(folder / "evaluation.json")
        assert evaluation["margin"] == margin and evaluation["differences"]["zero_state"]["beside_margin"] == place
        assert f"over zero state, {words} the margin of {margin}" in page_of(folder).text
    few = report_folder(tmp_path / "few", replace(evaluation_of(questions=8), margin=0.2))
    assert "beside_margin" not in read_evaluation(few / "evaluation.json")["differences"]["zero_state"]
    assert "margin" not in read_evaluation(report_folder(tmp_path / "none", evaluation_of()) / "evaluation.json")


@pytest.mark.parametrize("which", ["folder", "hostile_report"])
def test_the_page_is_valid_html_and_loads_nothing(which, request):
    folder = request.getfixturevalue(which)
    text, page = (folder / "index.html").read_text(), page_of(folder)
    assert not page.open, "something was never closed"
    policy = next(one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        assert attributes.get("href", "") in {"", *FILES}
        assert attributes.get("xlink:href", "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text)) and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [word for _, one in page.elements for word in one.get("aria-labelledby", "").split()]
    assert references and set(references) <= set(ids)
    assert all(one.get("scope") in ("row", "col") for one in page.of("th"))
    assert len(page.of("svg")) == 4 and all(one.get("viewbox") for one in page.of("svg"))


def test_answers_are_escaped(hostile_report):
    page, markdown = page_of(hostile_report), (hostile_report / "report.md").read_text()
    shown = EVIL.replace("\ud83d", "?")
    assert page.text.count(shown) > 8  # answers, right answers, the question, a group, a meaning, the command
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "state" in line or "lora" in line} == {5, 6}
    outside = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside) and "[x](" not in outside


def test_long_texts_are_shortened_and_few_histories_have_no_p_value(tmp_path):
    long = "word " * 1000
    folder = report_folder(tmp_path / "long", evaluation_of(answer=long, questions=8))
    text = (folder / "index.html").read_text()
    assert len(text) < 300_000 and f"{len(long) - MAX_SHOWN:,} more characters" in text and long not in text
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[0])["answer"] == long
    row = next(row for row in page_of(folder).rows if row[0] == "zero state" and row[-1] == "4")
    assert row[2] == "–"  # there is no p for so few histories


def test_negative_scores_and_unknown_conditions_are_drawn(tmp_path):
    """The axes cover the scores. Unknown conditions have their own style on light and on dark pages."""
    names = ["state", *(f"baseline_{number}" for number in range(7))]
    drawn = styles(names)
    assert len({style["marker"] for name, style in list(drawn.items())[:6]}) == 6
    assert all(style["color"] in DARK for style in styles([*names, "bm25", "full_context", "zero_state"]).values())
    rows = {name: [(-2.5, -3.0, -2.0), (-1.5, -1.75, -1.25)] for name in names}
    for groups in (("1 fact", "2 facts"), ("temporal", "costs $2 or $3")):
        axes = scores_figure("log_probability", groups, rows).axes[0]
        ends = axes.get_ylim() if groups[0] == "1 fact" else axes.get_xlim()
        assert min(ends) < -3.0 and -1.25 < max(ends) < 0
    text = svg(scores_figure("log_probability", groups, rows), "p", "a <title>", "b")
    assert "costs $2 or $3" in text and "a &lt;title&gt;" in text and "<metadata>" not in text
    assert svg(scores_figure("log_probability", groups, rows), "p", "a <title>", "b") == text  # nothing random
    shares = scores_figure("exact", ("1 fact", "2 facts"), {"state": [(0.5, 0.4, 0.6)] * 2}).axes[0]
    assert shares.get_ylim() == pytest.approx((-0.03, 1.03))


def test_a_narrow_terminal_shows_every_figure():
    groups = [f"long-range understanding, source {number}" for number in range(8)]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(score_table(evaluation_of(groups=groups)))
    assert "…" not in capture.get() and max(map(len, capture.get().splitlines())) <= 80


def test_existing_files_are_not_replaced(tmp_path, folder):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(DataError, match=r"index.html from something else"):
        check_folder(tmp_path / "site")
    check_folder(tmp_path / "new")
    check_folder(folder)


def test_a_run_writes_a_report_and_can_be_repeated(tmp_path, monkeypatch, checkpoint):
    """Run again, the command asks no question and writes the same figures. The report does not name this machine."""
    monkeypatch.chdir(tmp_path)
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), "adapter")
    options = ["--set", "facts=[1]", "--set", "episodes=3", "--truncate", "8", "--batch-size", "2", "--report"]
    words = [str(tmp_path / "adapter"), *options]
    first, again = (CliRunner().invoke(command, [*words, "out", *more]) for more in ([], ["--json"]))
    assert first.exit_code == 0 and first.stdout.endswith("Report: out/index.html\n"), first.output
    report, run = json.loads(again.stdout), json.loads(again.stdout)["run"]
    assert read_evaluation(Path("out/evaluation.json")) == report and {path.name for path in Path("out").iterdir()} == {
        *FILES
    }
    assert run["cost"]["asked"] == 0 and run["cost"]["answers"] == 3 * len(report["conditions"])
    assert run["command"][1:] == ["adapter", *options, "out", "--json"]
    assert run["options"]["truncate"] == 8
    assert run["options"]["batch_size"] == 2 and run["options"]["facts"] == [1] and run["options"]["dtype"] == "float32"
    assert run["mechanism"]["rank"] == 4 and run["versions"]["deltamem"] == __version__
    assert run["base"]["name"] == checkpoint.name
    assert not [name for name in FILES if str(tmp_path) in (Path("out") / name).read_text()]
    result = CliRunner().invoke(command, [*words, "out", "--records", "out"])
    assert result.exit_code == 2 and "leave out --records" in result.output
    other = CliRunner().invoke(command, [*words, "out", "--protocol", "full"])
    assert isinstance(other.exception, DataError) and "protocol" in str(other.exception)


def test_the_report_shows_the_command_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").touch()
    commands = []

    @click.command("eval")
    @click.argument("adapter")
    @click.option("-n", "--limit", type=int, default=3)
    @click.option("--set", "changes", multiple=True)
    @click.option("--fast", is_flag=True)
    def stub(**_):
        commands.extend(command_line(click.get_current_context()))

    arguments = ["owner/name", "-n", "4", "--set", f"data={tmp_path}/talks.jsonl", "--set", "a=b", "--fast"]
    assert CliRunner().invoke(stub, arguments).exit_code == 0
    assert commands == ["eval", "owner/name", "--limit", "4", "--set", "data=talks.jsonl", "--set", "a=b", "--fast"]
    assert without_folders("window:40") == "window:40" and without_folders("/nowhere/x") == "x"
