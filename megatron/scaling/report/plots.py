"""Learning curves of a set of runs: against epochs, against compute, generalisation, and by budget of unique tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron.runs.comparison import comparisons, overfitting
from megatron.runs.counts import format_count
from megatron.runs.crossing import crossing
from megatron.runs.run import Run
from megatron.scaling.report.panels import Chart, Panel
from megatron.scaling.report.style import LineStyle, count_seeds, first_budgets, limit_height, log_axis, run_styles


def learning_curves(runs: Sequence[Run]) -> Chart:
    """Validation against epochs: error bars of one standard error, training loss faint, the best point starred, where a run
    starts to overfit and where a pair crosses; against FLOPs where that is not the same picture; and the generalisation gap
    of the runs whose training loss is of the same kind as their validation."""
    panels = [Panel("Validation against epochs", partial(_draw_curves, runs=runs, x="epoch"))]
    if len({run.compute_parameters * run.unique_tokens for run in runs}) > 1:
        panels.append(Panel("Validation against compute", partial(_draw_curves, runs=runs, x="flops")))
    caption = (
        "Validation loss against epochs over the unique tokens. Bars are one standard error (the table says over what); the "
        "star is the best validation. The faint line is the training loss, averaged over equal steps of the log axis; a "
        "dotted line marks where a run starts to overfit, a grey one the validation from which on a pair has crossed."
    )
    if any(gap_curve(run)[0].size for run in runs):
        panels.append(Panel("Generalisation gap against epochs", partial(_draw_gaps, runs=runs)))
        caption += (
            " Generalisation gap: a validation minus the mean training loss since the one before; its bars are those of the "
            "validation alone."
        )
    return Chart("learning_curves", caption, panels)


def facets(runs: Sequence[Run]) -> Chart:
    """Validation against epochs for many runs: one panel per budget of unique tokens (at most six)."""
    budgets, rest = first_budgets(runs)
    return Chart(
        "curves_by_budget",
        "Validation loss against epochs, one panel per budget. Bars are one standard error (the table says over what); the "
        f"star is the best validation.{rest}",
        [
            Panel(f"Validation on {format_count(size)} unique tokens", partial(_draw_budget, runs=runs, budget=size))
            for size in budgets
        ],
        share_y=True,
        legend=_sized_legend(runs),
        legend_columns=3,
    )


def gap_curve(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, generalisation gap and its standard error (of the validation alone), float64 [validations].

    The gap is a validation minus the mean training loss of the steps since the one before. Empty where the training loss is
    another quantity than the validation.
    """
    empty = np.array([])
    if run.info.get("train_label", run.label) != run.label or not run.train:
        return empty, empty, empty
    steps, losses = run.train_column("step"), run.train_column("loss")
    found, before = [], 0
    for row in run.valid:
        window = losses[(steps > before) & (steps <= row.step) & np.isfinite(losses)]
        before = row.step
        if window.size and row.epoch > 0:
            found.append((row.epoch, row.nll - window.mean(), row.nll_se))
    return tuple(np.array(found, dtype=np.float64).reshape(-1, 3).T)  # type: ignore[return-value]


def _draw_curves(panel: Axes, *, runs: Sequence[Run], x: str) -> None:
    styles = run_styles(runs)
    for run, style in zip(runs, styles):
        _draw_run(panel, run, style=style, x=x)
    log_axis(panel, "epochs over the unique tokens" if x == "epoch" else "training FLOPs (6·N·D)")
    panel.set_ylabel("validation, nats per token")
    panel.set_title("Loss against epochs" if x == "epoch" else "Loss against compute")
    limit_height(panel, runs, below=3.0)
    if x == "epoch" and len(runs) <= 4:
        pairs = comparisons(runs)
        for run, style in zip(runs, styles):
            _mark_overfitting(panel, run, style, is_above=len(runs) <= 2)  # of several, one may rise to the top
        if len(pairs) == 1:
            _mark_crossing(panel, *pairs[0])
    panel.plot([], [], "*", markersize=11, color="white", markeredgecolor="black", label="best validation")
    panel.plot([], [], color="#999999", alpha=0.6, linewidth=1.0, label="faint: training loss")


def _draw_gaps(panel: Axes, *, runs: Sequence[Run]) -> None:
    for run, style in zip(runs, run_styles(runs)):
        epochs, gap, error = gap_curve(run)
        panel.errorbar(
            epochs, gap, yerr=np.where(np.isfinite(error), error, 0.0), color=style.color, linestyle=style.dash,
            marker=style.marker, markerfacecolor=style.fill, markersize=4, capsize=2, elinewidth=1.0,
        )  # fmt: skip
    panel.axhline(0, color="#666666", linewidth=0.8)
    log_axis(panel, "epochs over the unique tokens")
    panel.set_ylabel("validation − training, nats per token")
    panel.set_title("Generalisation gap")


def _draw_budget(panel: Axes, *, runs: Sequence[Run], budget: int) -> None:
    styles = dict(zip([run.path for run in runs], run_styles(runs)))
    members = [run for run in runs if run.unique_tokens == budget]
    for run in members:
        _draw_run(panel, run, style=styles[run.path], x="epoch", faint=True)
    panel.set_title(f"{format_count(budget)} unique tokens, {count_seeds(members)}")
    log_axis(panel, "epochs")
    limit_height(panel, runs)
    panel.set_ylabel("validation, nats per token")


def _draw_run(panel: Axes, run: Run, *, style: LineStyle, x: str, faint: bool = False) -> None:
    """One validation curve; ``faint`` is for panels with many runs: thin, and without the training loss."""
    across, nll, error = run.column(x), run.column("nll"), run.column("nll_se")
    keep = (across > 0) & np.isfinite(nll)
    error = np.where(np.isfinite(error), error, 0.0)
    if not faint:
        train_x, train_y = smooth_log(run.train_column(x), run.train_column("loss"))
        panel.plot(train_x, train_y, color=style.color, alpha=0.3, linewidth=1.0, linestyle=style.dash)
    panel.errorbar(
        across[keep],
        nll[keep],
        yerr=error[keep],
        color=style.color,
        linestyle=style.dash,
        linewidth=1.2 if faint else 1.8,
        marker=style.marker,
        markerfacecolor=style.fill,
        markersize=3 if faint else 4.5,
        capsize=0 if faint else 2.5,
        elinewidth=1.0,
        label=", ".join(part for part in (run.title, run.origin) if part) + f" – {run.label}",
    )
    if run.averaged:
        across, nll = run.column(x, averaged=True), run.column("nll", averaged=True)
        keep = (across > 0) & np.isfinite(nll)
        panel.plot(
            across[keep],
            nll[keep],
            color=style.color,
            linestyle=":",
            linewidth=1.2,
            label=f"{run.title} – averaged weights",
        )
    best = run.best
    if best is not None and getattr(best, x) > 0:
        panel.plot(
            getattr(best, x), best.nll, marker="*", markersize=9 if faint else 15, color=style.color,
            markeredgecolor="black", markeredgewidth=0.8, zorder=5,
        )  # fmt: skip


def smooth_log(x: np.ndarray, y: np.ndarray, bins: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Means of y in equal steps of log x, so that a long training log becomes a readable line."""
    keep = (x > 0) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if x.size <= bins:
        return x, y
    edges = np.geomspace(x.min(), x.max() * (1 + 1e-9), bins + 1)
    index = np.digitize(x, edges) - 1
    filled = np.unique(index)
    return (
        np.array([np.exp(np.log(x[index == i]).mean()) for i in filled]),
        np.array([y[index == i].mean() for i in filled]),
    )


def _mark_overfitting(panel: Axes, run: Run, style: LineStyle, *, is_above: bool) -> None:
    turn = overfitting(run)
    if turn is None or not turn.rises:
        return
    panel.axvline(turn.best.epoch, color=style.color, linewidth=0.9, linestyle=":")
    panel.annotate(
        f"{run.objective.upper()} overfits\nfrom epoch {turn.best.epoch:.3g}",
        (turn.best.epoch, 0.98 if is_above else 0.02), xycoords=("data", "axes fraction"), xytext=(5, 0),
        textcoords="offset points", va="top" if is_above else "bottom", fontsize=8.5, color=style.color,
    )  # fmt: skip


def _mark_crossing(panel: Axes, first: Run, second: Run) -> None:
    """A grey line, named at the bottom where faint training losses are the only neighbours."""
    epoch = crossing(first, second).epoch
    if epoch is None:
        return
    panel.axvline(epoch, color="#555555", linewidth=0.9)
    panel.annotate(
        f"{second.objective.upper()} below {first.objective.upper()}\nfrom epoch {epoch:.3g}",
        (epoch, 0.02), xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points",
        ha="right", va="bottom", fontsize=8.5, color="#444444",
    )  # fmt: skip


def _sized_legend(runs: Sequence[Run]) -> dict[str, Any]:
    """One entry per objective and size, not per run; the panels say how many seeds."""
    seen: dict[str, Any] = {}
    for run, style in zip(runs, run_styles(runs)):
        seen.setdefault(
            f"{run.objective.upper()} {run.size_name} – {run.label}",
            plt.Line2D([], [], color=style.color, linestyle=style.dash, marker=style.marker, markersize=4),
        )
    return seen
