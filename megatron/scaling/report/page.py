"""Run directories → one self-contained HTML page, with every figure also as PNG and SVG beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from megatron.errors import UserError
from megatron.files import replace_file
from megatron.runs.comparison import summary_row
from megatron.runs.conclusion import conclusion
from megatron.runs.replicates import average_seeds
from megatron.runs.run import Run
from megatron.scaling.chinchilla import DataConstrained
from megatron.scaling.fit import Fit, of_one_source
from megatron.scaling.multiplier import Baseline
from megatron.scaling.report import brackets, law_plots, plots
from megatron.scaling.report.frontier import iso_loss, pareto
from megatron.scaling.report.generalisation import generalisation_html
from megatron.scaling.report.look import CSS
from megatron.scaling.report.pairs import pair_numbers_html
from megatron.scaling.report.panels import Chart, save
from megatron.scaling.report.provenance import provenance_html, samples_html
from megatron.scaling.report.tables import (
    downstream_html,
    evaluations_html,
    laws_html,
    multipliers_html,
    notes_html,
    pairs_html,
    problems_html,
    searches_html,
    section,
    table,
)

MAX_OVERLAID_RUNS = 6
"""More runs than this are drawn one panel per budget of unique tokens instead of all in one."""
PAGE = "report.html"
COSTS = ("Parameters", "Unique tokens", "Epochs", "Seed", "Training FLOPs", "Tokens/s", "Scoring FLOPs per token")
"""Columns of the second table of runs."""


def write_report(
    runs: Sequence[Run],
    folder: Path,
    title: str = "AR and masked diffusion compared",
    *,
    fits: Sequence[Fit] = (),
    baseline: Baseline | None = None,
    left_out: list[str] | None = None,
) -> Path:
    """Write report.html, and each figure as PNG and SVG, into ``folder``.

    Runs that differ only in their seed are shown as their mean; the table of runs has each of them too.

    Args:
        fits: laws fitted to these or other runs (tools/fit_laws.py), for the figures and the table of laws.
        baseline: a recipe by which the data efficiency of every run is measured.
        left_out: what could not be read, in words; what is found so beside the runs is added.

    Returns:
        the path of report.html, which needs no other file.

    Raises:
        UserError: no run was given.
    """
    if not runs:
        raise UserError("no run given", "a report shows at least one run", "name run directories or folders of them")
    folder.mkdir(parents=True, exist_ok=True)
    left_out = [] if left_out is None else left_out
    beside = [brackets.brackets_html(runs, folder, left_out), generalisation_html(runs, folder, left_out)]
    downstream = downstream_html(runs, left_out)
    shown = average_seeds(runs)
    rows = [*runs, *(run for run in shown if run.seeds)]
    page = _page(
        title,
        [
            section("What these runs show", "".join(f"<p>{html.escape(text)}</p>" for text in conclusion(shown))),
            *[save(chart, folder) for chart in charts(shown, fits)],
            *beside,
            pair_numbers_html(shown),
            samples_html(runs),
            section("Runs", _runs_html(rows) + problems_html(runs, left_out)),
            searches_html(runs),
            evaluations_html(runs),
            multipliers_html(shown, baseline),
            section("Matched pairs", pairs_html(runs)),
            laws_html(fits),
            downstream,
            section("How to read this", notes_html()),
            provenance_html(runs),
        ],
    )
    target = folder / PAGE
    replace_file(target, page)
    return target


def _runs_html(runs: Sequence[Run]) -> str:
    """Results and, in a table of their own that a phone can show, what the runs are and cost."""
    rows = [summary_row(run) for run in runs]
    results = [{name: value for name, value in row.items() if name not in COSTS} for row in rows]
    costs = [{"Run": row["Run"], **{name: row[name] for name in COSTS}} for row in rows]
    return table(results, "Runs: results") + table(costs, "Runs: size, data and cost")


def charts(runs: Sequence[Run], fits: Sequence[Fit] = ()) -> list[Chart]:
    """The charts that these runs allow."""
    validated = [run for run in runs if run.valid]
    if not validated:
        return []
    few = len(validated) <= MAX_OVERLAID_RUNS
    found = [plots.learning_curves(validated) if few else plots.facets(validated)]
    if len(validated) > 2:
        contours = iso_loss(validated)
        found += [pareto(validated), *([contours] if contours else [])]
    if any(isinstance(fit.law, DataConstrained) for fit in fits):
        found.append(law_plots.data_value(fits))
    if fits:
        by_objective = of_one_source(fits)
        found.append(law_plots.critical_line(by_objective.get("ar"), by_objective.get("mdm"), validated))
    return found


def _page(title: str, sections: Sequence[str]) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>'
        f'<header><h1>{html.escape(title)}</h1><p class="meta written">Written {now} by tools/report.py</p></header>\n<main>'
        + "\n".join(part for part in sections if part)
        + "</main>\n</body></html>\n"
    )
