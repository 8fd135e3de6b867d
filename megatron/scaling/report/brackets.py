"""Every likelihood of the same tokens in one picture: exact values, bounds from above and below, and the verdicts in words."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from megatron.runs.likelihoods import EXACT, FLOOR, EnsembleRecord, Likelihoods, Value
from megatron.runs.reading import readable
from megatron.runs.run import Run
from megatron.scaling.report.panels import Chart, Panel, save
from megatron.scaling.report.style import LineStyle, objective_style
from megatron.scaling.report.tables import section, table

MARK, LINE, AROUND = 0.26, 0.15, 0.75
"""Inches of a mark, of a line of the name above it, and of all that is around the rows."""
MAX_LETTERS = 64
"""Of a line in a panel as wide as a phone."""
CAPTION = (
    "Negative log-likelihood of the same tokens, one row a run and estimator; lower is better. A dot is an exact value. An arrow "
    "to the left is a bound from above: what it bounds lies on the shaded side; an arrow to the right is one from below. Bars "
    "are 95 % intervals over documents. Exact values of one model are those of different samplers; a bound is of the mixture "
    "over random orders, or, of a model without masks, of ancestral sampling in many steps."
)


def find_likelihoods(runs: Sequence[Run], left_out: list[str]) -> dict[Path, Likelihoods]:
    """What ``megatron likelihood --output`` wrote as ``likelihood*.json`` in the folders of runs or beside them, by its place;
    ``left_out`` receives which cannot be read."""
    folders = dict.fromkeys(folder.resolve() for run in runs for folder in (run.path, run.path.parent))
    files = [file for folder in folders for file in sorted(folder.glob("likelihood*.json"))]
    return dict(readable(lambda file: (file, Likelihoods.load(file)), files, left_out))


def brackets_html(runs: Sequence[Run], folder: Path, left_out: list[str]) -> str:
    """A chart, the verdicts and the numbers of every record of likelihoods; nothing where there is none.

    Args:
        runs: where the records are looked for.
        folder: of the chart's files.
        left_out: receives which cannot be read.
    """
    parts = []
    for number, (file, found) in enumerate(find_likelihoods(runs, left_out).items(), 1):
        chart = bracket_chart(found, runs, stem=f"brackets_{number}" if number > 1 else "brackets")
        verdicts = "".join(
            f"<p><b>{html.escape(own.answer)}.</b> {html.escape(_typeset(own.reason))}.</p>" for own in found.verdicts
        )
        verdicts += "".join(f"<p>{html.escape(_fit(own))}</p>" for own in found.ensembles if own.is_fitted)
        rows = [_row(own) for own in found.findings]
        parts.append(save(chart, folder) + verdicts + table(rows, f"Likelihoods of {file.name}"))
    return section("Likelihoods", "".join(parts)) if parts else ""


def bracket_chart(found: Likelihoods, runs: Sequence[Run] = (), *, stem: str = "brackets") -> Chart:
    """One panel with a row for every value.

    Args:
        found: the values.
        runs: of which models have the colour of their objective.
        stem: name of the chart's files.
    """
    documents = max((own.documents for own in found.findings), default=0)
    title = f"{found.samples:,} samples of {found.seq_length:,} tokens, {documents:,} documents"
    draw = partial(_draw, values=found.findings, styles=_styles(found.findings, runs), title=title)
    height = AROUND + (MARK + LINE * _lines(found.findings)) * max(len(found.findings), 2)
    panel = Panel(_in_words(found), draw, height)
    return Chart(stem, CAPTION, [panel])


def _styles(values: Sequence[Value], runs: Sequence[Run]) -> dict[str, LineStyle]:
    """One for each model: that of its objective where it is a run of the report."""
    objectives = {run.name: run.objective for run in runs} | {run.path.name: run.objective for run in runs}
    models = list(dict.fromkeys(own.model for own in values))
    # An ensemble is of the objective of its members, of which the first is the first in its name.
    names = [objectives.get(model) or objectives.get(model.split("+")[0], model) for model in models]
    return {model: objective_style(name, names) for model, name in zip(models, names)}


def _in_words(found: Likelihoods) -> str:
    """The picture, for those who hear the page."""
    values = "; ".join(f"{_name(own)} {_number(own)}" for own in found.findings)
    return f"Likelihoods, nats per token. {values}"


def _draw(panel: Axes, *, values: Sequence[Value], styles: dict[str, LineStyle], title: str) -> None:
    shown = [own for own in values if math.isfinite(own.nll)]
    low, high = _limits(shown)
    half = MARK / (MARK + LINE * _lines(values)) / 2  # of a mark, in rows
    for place, own in enumerate(values):
        _draw_value(panel, own, (place + 1 - 1.7 * half, place + 1 - half), styles[own.model], (low, high))
    panel.set_xlim(low, high)
    panel.set_ylim(len(values) + 0.1, 0.0)
    panel.set_yticks([])
    panel.grid(visible=False, axis="y")
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("nats per token (lower is better)")
    panel.set_title(title)


def _limits(values: Sequence[Value]) -> tuple[float, float]:
    """The range of all bars, with a margin and room for a number on the right; of one value, a little around it."""
    if not values:
        return 0.0, 1.0
    reach = np.array([own.reach_95 if math.isfinite(own.reach_95) else 0.0 for own in values])
    nll = np.array([own.nll for own in values])
    low, high = float((nll - reach).min()), float((nll + reach).max())
    width = high - low or 0.5
    return low - 0.06 * width, high + 0.36 * width


def _lines(values: Sequence[Value]) -> int:
    """Of the longest name."""
    return max((len(textwrap.wrap(_name(own), MAX_LETTERS)) for own in values), default=1)


def _draw_value(
    panel: Axes, own: Value, places: tuple[float, float], style: LineStyle, limits: tuple[float, float]
) -> None:
    """The name of a row, and below it the mark with its bar."""
    above, place = places
    write = partial(panel.text, fontsize=8.3, color=style.color, zorder=4)
    name = write(0.0, above, textwrap.fill(_name(own), MAX_LETTERS), va="bottom", transform=panel.get_yaxis_transform())
    name.set_in_layout(False)  # else a long name would make the panel narrow
    if not math.isfinite(own.nll):
        return
    marker, end = {EXACT: ("o", None), FLOOR: (">", limits[1])}.get(own.kind, ("<", limits[0]))
    if end is not None:
        panel.fill_betweenx([place - 0.1, place + 0.1], own.nll, end, color=style.color, alpha=0.13, linewidth=0)
    reach = own.reach_95 if math.isfinite(own.reach_95) else 0.0
    panel.errorbar(
        own.nll, place, xerr=reach, color=style.color, marker=marker, markersize=6, capsize=2.5, elinewidth=1.2,
        label=f"{own.model} – {own.kind}",
    )  # fmt: skip
    write(own.nll + reach + 0.02 * (limits[1] - limits[0]), place, _number(own), va="center")


def _fit(own: EnsembleRecord) -> str:
    return (
        f"{own.name}: weights fitted on one half of the documents, where they give {own.after:.3f} nats per token instead of "
        f"{own.before:.3f}; its values are of the other half. {own.members}"
    )


def _name(own: Value) -> str:
    return f"{own.model} · {own.estimator} · {own.kind}"


def _row(own: Value) -> dict[str, str]:
    return {
        "Run": own.model,
        "Estimator": own.estimator,
        "What it is": own.kind,
        "Nats/token, ± 95 %": _number(own),
        "Passes": f"{own.passes:,}",
        "Near ties": f"{own.near_ties:,} of {own.tokens:,}" if own.near_ties else "–",
    }


def _number(own: Value) -> str:
    reach = f" ± {own.reach_95:.3f}" if math.isfinite(own.reach_95) else ""
    return f"{own.nll:.3f}{reach}"


def _typeset(text: str) -> str:
    """A minus in front of a number is one."""
    return f"−{text[1:]}" if text.startswith("-") else text
