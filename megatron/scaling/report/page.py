"""Run directories → one self-contained HTML page, with every figure also as PNG and SVG beside it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.runs.comparison import Difference, conclusion, matched_pairs, summary_row
from megatron.runs.reading import Run
from megatron.runs.replicates import average_seeds
from megatron.scaling.fit import Fit
from megatron.scaling.laws import DataConstrained
from megatron.scaling.report import law_plots, plots

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
        ValueError: no run was given.
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
            _section("What these runs show", "".join(f"<p>{html.escape(text)}</p>" for text in conclusion(shown))),
            *[_figure(entry) for entry in figures],
            _section("Runs", _table([summary_row(run) for run in rows]) + _table_notes(runs)),
            _section("Matched pairs", _pairs_html(runs)),
            _laws_html(fits),
            _downstream_html(runs),
            _section("How to read this", _notes_html()),
            _section("Provenance", _provenance_html(runs)),
        ],
    )
    target = folder / "report.html"
    temporary = target.with_name("report.html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def make_figures(runs: Sequence[Run], folder: Path, fits: Sequence[Fit] = ()) -> list[FigureEntry]:
    """Draw and save the figures that these runs allow."""
    validated = [run for run in runs if run.valid]
    if not validated:
        return []
    entries = []

    def add(stem: str, figure: Any, caption: str) -> None:
        if figure is not None:
            entries.append(FigureEntry(stem, caption, plots.save(figure, folder / stem)))

    bars = "Bars are one standard error over validation samples and noise draws; the star is the best validation."
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
            plots.pareto(validated),
            "Every validation of every run (faint) and the lowest loss that each objective reaches for a compute "
            "budget. Points along a run are taken before its learning rate has decayed, so the frontier is what these "
            "runs reach, not the best possible.",
        )
        add(
            "iso_loss",
            plots.iso_loss(validated),
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


def _table(rows: Sequence[dict[str, str]]) -> str:
    """An HTML table; numbers are right-aligned by the style of all but the first two columns."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_notes(runs: Sequence[Run]) -> str:
    notes = []
    for run in runs:
        for row in run.other_valid:
            notes.append(
                f"{run.name}, step {row.step:,}: also validated with {row.num_mc} draws on {row.num_samples:,} samples: "
                f"{row.nll:.4f} ± {row.nll_se:.4f} nats/token ({row.label})."
            )
    return "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _pairs_html(runs: Sequence[Run]) -> str:
    pairs = matched_pairs(runs)
    if not pairs:
        return "<p>There is no pair of AR and another objective among these runs.</p>"
    parts = [
        "<p>Two runs of one comparison may differ in objective (and the attention that comes with it) only. "
        "Compared for every other run is the AR run closest to it:</p><ul>"
    ]
    for first, second, found in pairs:
        names = f"<b>{html.escape(first.name)}</b> and <b>{html.escape(second.name)}</b>"
        parts.append(f"<li>{names}: {_differences_html(found)}</li>")
    return "".join(parts) + "</ul>"


def _differences_html(found: Sequence[Difference]) -> str:
    real = [html.escape(str(item)) for item in found if not item.layout]
    layout = [html.escape(str(item)) for item in found if item.layout]
    text = (
        "matched: only the objective differs."
        if not real
        else f'<span class="warn">not matched</span>: {"; ".join(real)}.'
    )
    if layout:
        text += f" Layout differs too, which should not change the numbers: {'; '.join(layout)}."
    return text


def _laws_html(fits: Sequence[Fit]) -> str:
    """Parameters of fitted laws with intervals and held-out errors; nothing without fits."""
    if not fits:
        return ""
    rows = []
    for fit in fits:
        errors = [fit.noise, fit.cross_validation, fit.extrapolation]
        shown = ["–" if value is None else f"{value:.2%}" for value in errors]
        rows.append(
            {
                "Objective": fit.objective.upper(),
                "Kind": fit.label,
                "Law": fit.law.equation,
                "Parameters, 95 % intervals": ", ".join(f"{name} = {fit.interval(name)}" for name in fit.law.names),
                "Losses (runs)": f"{fit.num_points} ({fit.num_runs})",
                "Residual": shown[0],
                "Left-out runs": shown[1],
                "Largest left-out runs": shown[2],
            }
        )
    return _section(
        "Laws", _table(rows) + "<p>A law says nothing about sizes, budgets and epochs far from these runs.</p>"
    )


def _downstream_html(runs: Sequence[Run]) -> str:
    """A table of lm-eval style results (``RUN/downstream*.json``); nothing when no run has them."""
    scores = {run.name: load_downstream(run.path) for run in runs}
    scores = {name: tasks for name, tasks in scores.items() if tasks}
    if not scores:
        return ""
    names = sorted({task for tasks in scores.values() for task in tasks})
    rows = []
    for run in runs:
        if run.name in scores:
            cells = {"Run": run.name, "Objective": run.objective.upper()}
            cells.update({name: scores[run.name].get(name, "–") for name in names})
            rows.append(cells)
    return _section("Downstream", _table(rows) + "<p>± is the standard error over the items of a task.</p>")


def load_downstream(folder: Path) -> dict[str, str]:
    """``{"task metric": "0.512 ± 0.014"}`` from the lm-eval results in ``folder``.

    The metric of a task is acc_norm where there is one, else acc, else its first number.

    Raises:
        ValueError: a file is not JSON or has no "results".
    """
    found: dict[str, str] = {}
    for file in sorted(folder.glob("downstream*.json")):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{file} is not an lm-eval result",
                'such a file is JSON with a "results" object',
                "delete it or write it again with the evaluation tool",
            ) from None
        for task, metrics in results.items():
            values = {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, (int, float))}
            plain = [name for name in values if not name.endswith("_stderr")]
            if not plain:
                continue
            metric = next((name for name in ("acc_norm", "acc") if name in values), plain[0])
            error = values.get(f"{metric}_stderr", math.nan)
            found[f"{task} {metric}"] = f"{values[metric]:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")
    return found


def _notes_html() -> str:
    notes = (
        "<b>NLL (exact)</b> is the negative log-likelihood that an autoregressive model gives to held-out text. "
        "<b>NLL bound</b> is an upper bound on it, estimated by random masking: the model's true NLL is at or below "
        "it. A bound below an exact NLL therefore shows that the bounded model is better; a bound above it decides "
        "nothing by itself.",
        "<b>±</b> is one standard error over validation samples (and noise draws, for bounds). Differences under two "
        "standard errors are not called differences. Runs that differ only in their seed are drawn and compared as their "
        "mean; its ± also holds the spread between the seeds.",
        "<b>Overfits from epoch e</b>: the last validation lies above the best one, at epoch e, by more than two "
        "standard errors of the difference.",
        "<b>Training FLOPs</b> are 6·N·D with N the parameters of the compute formula (4Lh² + 3Lh·ffn + 6Lh + Vh) and D "
        "the training tokens, repeated ones included.",
        "<b>Scoring FLOPs per token</b> are 2·N for one pass, times the number of noise draws of a bound. Generating "
        "costs 2·N a token with a key/value cache (AR), and 2·N times the number of denoising steps a token without "
        "one (MDM): up to the sequence length when every step reveals one token.",
        "<b>Perplexity</b> is exp(NLL), <b>bits per byte</b> is NLL / ln 2 / (bytes of text per token); only the latter "
        "can be compared between tokenizers.",
        "Validations along a run are taken before its learning rate has decayed; a run planned for that many epochs "
        "would end a little lower.",
    )
    return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _provenance_html(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        versions = run.info.get("versions") or {}
        rows.append(
            {
                "Run": run.name,
                "Started": str(run.info.get("started", "–")),
                "Device": str(run.info.get("device", "–")),
                "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            }
        )
    return _table(rows)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


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
#pareto img, #data_value img, #critical_compute img { max-width: 44rem; display: block; }
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
