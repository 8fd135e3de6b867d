"""Learning curves of a set of runs: against epochs, against compute, and one panel per budget of unique tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron.runs.comparison import overfitting
from megatron.runs.counts import format_count
from megatron.runs.run import Run
from megatron.scaling.report.style import (
    RC,
    LineStyle,
    count_seeds,
    figure_legend,
    fitting_legend,
    limit_height,
    log_axis,
    run_styles,
)


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Validation against epochs and against training FLOPs (log x): error bars of one standard error, training loss
    faint, the best point starred, and a line where a run starts to overfit."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.3), sharey=True, layout="constrained")
        for panel, (x, label) in zip(
            axes, (("epoch", "epochs over the unique tokens"), ("flops", "training FLOPs (6·N·D)"))
        ):
            for run, style in zip(runs, run_styles(runs)):
                _draw_run(panel, run, style=style, x=x)
            log_axis(panel, label)
        axes[0].set_ylabel("nats per token")
        axes[0].set_title("Loss against epochs")
        axes[1].set_title("Loss against compute")
        limit_height(axes[0], runs, below=3.0)
        for run, style in zip(runs, run_styles(runs)):
            if len(runs) <= 4:
                _mark_overfitting(axes[0], run, style)
        axes[0].plot([], [], "*", markersize=11, color="white", markeredgecolor="black", label="best validation")
        axes[0].plot([], [], color="#999999", alpha=0.6, linewidth=1.0, label="faint: training loss")
        figure_legend(figure, axes[:1])
    return figure


def facets(runs: Sequence[Run]) -> Figure:
    """Validation against epochs for more than four runs: one panel per budget of unique tokens (at most six)."""
    budgets = sorted({run.unique_tokens for run in runs})[:6]
    columns = min(3, len(budgets))
    rows = -(-len(budgets) // columns)
    styles = dict(zip([run.path for run in runs], run_styles(runs)))
    with plt.rc_context(RC):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(1.4 + 3.3 * columns, 0.9 + 3.1 * rows),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, budget in zip(grid.flat, budgets):
            members = [run for run in runs if run.unique_tokens == budget]
            for run in members:
                _draw_run(panel, run, style=styles[run.path], x="epoch", faint=True)
            panel.set_title(f"{format_count(budget)} unique tokens, {count_seeds(members)}")
            log_axis(panel, "epochs")
            limit_height(panel, runs)
        for panel in grid.flat[len(budgets) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("validation, nats per token")
        _sized_legend(figure, runs)
    return figure


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
        label=f"{run.title} – {run.label}",
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


def _mark_overfitting(panel: Axes, run: Run, style: LineStyle) -> None:
    turn = overfitting(run)
    if turn is None or not turn.rises:
        return
    panel.axvline(turn.best.epoch, color=style.color, linewidth=0.9, linestyle=":")
    panel.annotate(
        f"{run.objective.upper()} overfits\nfrom epoch {turn.best.epoch:.3g}",
        (turn.best.epoch, 0.98), xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points",
        va="top", fontsize=8.5, color=style.color,
    )  # fmt: skip


def _sized_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """One entry per objective and size, not per run; the panels say how many seeds."""
    seen: dict[str, Any] = {}
    for run, style in zip(runs, run_styles(runs)):
        seen.setdefault(
            f"{run.objective.upper()} {run.size_name} – {run.label}",
            plt.Line2D([], [], color=style.color, linestyle=style.dash, marker=style.marker, markersize=4),
        )
    fitting_legend(figure, seen, 3)
