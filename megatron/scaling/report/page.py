"""Run directories → one self-contained HTML page, with every figure also as PNG and SVG beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import replace_file
from megatron.runs.comparison import summary_row
from megatron.runs.conclusion import conclusion
from megatron.runs.replicates import average_seeds
from megatron.runs.run import Run
from megatron.scaling.fit import Fit
from megatron.scaling.laws import DataConstrained
from megatron.scaling.report import law_plots, plots
from megatron.scaling.report.frontier import iso_loss, pareto
from megatron.scaling.report.style import save
from megatron.scaling.report.tables import (
    downstream_html,
    laws_html,
    notes_html,
    pairs_html,
    provenance_html,
    section,
    table,
    table_notes,
)

MAX_OVERLAID_RUNS = 6
"""More runs than this are drawn one panel per budget of unique tokens instead of all in one."""


@dataclass(frozen=True)
class FigureEntry:
    """A saved figure: file ``stem``, caption, and the SVG to embed."""

    stem: str
    caption: str
    svg: bytes


def write_report(
    runs: Sequence[Run], folder: Path, title: str = "AR and masked diffusion compared", *, fits: Sequence[Fit] = ()
) -> Path:
    """Write report.html, and each figure as PNG and SVG, into ``folder``.

    Runs that differ only in their seed are shown as their mean; the table of runs has each of them too.

    Args:
        fits: laws fitted to these or other runs (tools/fit_laws.py), for the figures and the table of laws.

    Returns:
        the path of report.html, which needs no other file.

    Raises:
        UserError: no run was given.
    """
    if not runs:
        raise UserError("no run given", "a report shows at least one run", "name run directories or folders of them")
    folder.mkdir(parents=True, exist_ok=True)
    shown = average_seeds(runs)
    figures = make_figures(shown, folder, fits)
    rows = [*runs, *(run for run in shown if run.seeds)]
    page = _page(
        title,
        [
            section("What these runs show", "".join(f"<p>{html.escape(text)}</p>" for text in conclusion(shown))),
            *[_figure(entry) for entry in figures],
            section("Runs", table([summary_row(run) for run in rows]) + table_notes(runs)),
            section("Matched pairs", pairs_html(runs)),
            laws_html(fits),
            downstream_html(runs),
            section("How to read this", notes_html()),
            section("Provenance", provenance_html(runs)),
        ],
    )
    target = folder / "report.html"
    replace_file(target, page)
    return target


def make_figures(runs: Sequence[Run], folder: Path, fits: Sequence[Fit] = ()) -> list[FigureEntry]:
    """Draw and save the figures that these runs allow."""
    validated = [run for run in runs if run.valid]
    if not validated:
        return []
    entries = []

    def add(stem: str, figure: Any, caption: str) -> None:
        if figure is not None:
            entries.append(FigureEntry(stem, caption, save(figure, folder / stem)))

    bars = "Bars are one standard error (the table says over what); the star is the best validation."
    if len(validated) <= MAX_OVERLAID_RUNS:
        add(
            "learning_curves",
            plots.learning_curves(validated),
            f"Validation loss against epochs over the unique tokens and against training compute. {bars} "
            "The faint line is the training loss, averaged over equal steps of the log axis; a dotted line marks where "
            "a run starts to overfit.",
        )
    else:
        add(
            "curves_by_budget", plots.facets(validated), f"Validation loss against epochs, one panel per budget. {bars}"
        )
    if len(validated) > 2:
        add(
            "pareto",
            pareto(validated),
            "Every validation of every run (faint) and the lowest loss that each objective reaches for a compute "
            "budget, one panel per budget of unique tokens. Points along a run are taken before its learning rate has "
            "decayed, so the frontier is what these runs reach, not the best possible.",
        )
        add(
            "iso_loss",
            iso_loss(validated),
            "Lines of equal validation loss over epochs and parameters; dots are measurements, the star is the best. "
            "Between dots the surface is linear interpolation.",
        )
    if fits:
        by_objective = {fit.objective: fit for fit in fits}
        add(
            "data_value",
            law_plots.data_value(fits) if any(isinstance(fit.law, DataConstrained) for fit in fits) else None,
            "How many epochs of new data the repeated data is worth. Shaded: 95 % interval of the fit; dotted: published "
            "half-lives, not measured here.",
        )
        add(
            "critical_compute",
            law_plots.critical_line(by_objective.get("ar"), by_objective.get("mdm"), validated),
            "Above the line MDM reaches a lower validation number than AR on the same unique tokens. The published line "
            "is quoted; crossings are drawn where the fits of both objectives cross at all.",
        )
    return entries


def _figure(entry: FigureEntry) -> str:
    data = base64.b64encode(entry.svg).decode()
    return (
        f'<figure id="{entry.stem}"><img alt="{html.escape(entry.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(entry.caption)} Files: {entry.stem}.png, {entry.stem}.svg.</figcaption></figure>"
    )


_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d1d1f;
       background: #fff; max-width: 66rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; font-weight: 650; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 2.2rem 0 .5rem; }
p, li { max-width: 46rem; }
.meta, figcaption { color: #5c5c61; font-size: .875rem; }
figure { margin: 1.6rem 0; }
figure img { width: 100%; height: auto; }
#data_value img, #critical_compute img { max-width: 44rem; display: block; }
figcaption { max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th { text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid #1d1d1f;
     padding: .3rem .6rem .3rem 0; }
td { border-bottom: 1px solid #e2e2e4; padding: .3rem .6rem .3rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
.warn { font-weight: 650; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  figure, table, section > p { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  table { font-size: 6pt; }
}
"""


def _page(title: str, sections: Sequence[str]) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="meta">Written {now} by tools/report.py</p>'
        + "\n".join(part for part in sections if part)
        + "</body></html>\n"
    )
