"""A comparison as a page."""

from __future__ import annotations

from dataclasses import asdict

from matplotlib.figure import Figure

from deltamem_tool.evaluation.conditions import in_words
from deltamem_tool.evaluation.report.compare import Comparison
from deltamem_tool.evaluation.report.drawing import DARK, differences_figure
from deltamem_tool.evaluation.report.page import both_widths
from deltamem_tool.evaluation.report.templating import rendered


def comparison_page(found: Comparison) -> bytes:
    """HTML that needs no other file."""
    overall = {row.condition: {**asdict(row), "clear": row.is_clear} for row in found.overall}
    axis = f"B minus A, {in_words(found.metric)}, all questions"

    def draw(narrow: bool) -> Figure:
        return differences_figure(axis, overall, narrow)

    sections = [
        ("all questions" if group is None else group, [row for row in found.rows if row.group == group])
        for group in dict.fromkeys(row.group for row in found.rows)
    ]
    return rendered(
        "compare.html.jinja",
        dark=DARK,
        found=found,
        sections=sections,
        plot=both_widths("differences", draw, "B minus A", "; ".join(found.verdict())) if overall else None,
    )
