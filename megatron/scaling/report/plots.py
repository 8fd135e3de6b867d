"""Figures of a set of runs, for screen, print and colour-blind readers (matplotlib without a display).

Objectives differ in hue (Okabe-Ito palette), line style and marker, so a grey print loses nothing; sizes of one
objective differ in lightness and marker fill. Every legend entry says whether its numbers are exact or a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron.runs.comparison import overfitting
from megatron.runs.reading import Run, format_count

RC: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "megatron.scaling",
    "figure.dpi": 100,
}

_BASE: dict[str, tuple[str, Any, str]] = {
    "ar": ("#0072B2", "-", "o"),
    "mdm": ("#D55E00", (0, (6, 2)), "s"),
}
_OTHERS: tuple[tuple[str, Any, str], ...] = (
    ("#009E73", (0, (4, 1.5, 1, 1.5)), "^"),
    ("#CC79A7", (0, (1.2, 1.2)), "D"),
    ("#8A6D00", (0, (8, 2, 1, 2, 1, 2)), "v"),
    ("#56B4E9", (0, (3, 1)), "P"),
    ("#444444", (0, (2, 4)), "X"),
)
MAX_LEGEND = 12


@dataclass(frozen=True)
class LineStyle:
    color: str
    dash: Any
    marker: str
    fill: str


def objective_style(objective: str, objectives: Sequence[str] = ()) -> LineStyle:
    """Hue, dash and marker of an objective; the same in every figure of a report."""
    if objective in _BASE:
        color, dash, marker = _BASE[objective]
    else:
        extra = sorted(name for name in set(objectives) | {objective} if name not in _BASE)
        color, dash, marker = _OTHERS[extra.index(objective) % len(_OTHERS)]
    return LineStyle(color, dash, marker, color)


def run_styles(runs: Sequence[Run]) -> list[LineStyle]:
    """One style per run: the objective's hue, dash and marker; larger models darker, other budgets hollow markers."""
    objectives = [run.objective for run in runs]
    styles = []
    for run in runs:
        base = objective_style(run.objective, objectives)
        sizes = sorted({other.parameters for other in runs if other.objective == run.objective})
        alike = [other for other in runs if (other.objective, other.parameters) == (run.objective, run.parameters)]
        epochs = sorted({other.epochs for other in alike})
        color = base.color
        if len(sizes) > 1:
            color = _lightness(base.color, sizes.index(run.parameters) / (len(sizes) - 1))
        fill = color if epochs.index(run.epochs) % 2 == 0 else "white"
        styles.append(LineStyle(color, base.dash, base.marker, fill))
    return styles


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
            _log_axis(panel, label)
        axes[0].set_ylabel("nats per token")
        axes[0].set_title("Loss against epochs")
        axes[1].set_title("Loss against compute")
        _limit_height(axes[0], runs, below=3.0)
        for run, style in zip(runs, run_styles(runs)):
            if len(runs) <= 4:
                _mark_overfitting(axes[0], run, style)
        axes[0].plot([], [], "*", markersize=11, color="white", markeredgecolor="black", label="best validation")
        axes[0].plot([], [], color="#999999", alpha=0.6, linewidth=1.0, label="faint: training loss")
        figure_legend(figure, axes[0])
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
            _log_axis(panel, "epochs")
            _limit_height(panel, runs)
        for panel in grid.flat[len(budgets) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("validation, nats per token")
        _sized_legend(figure, runs)
    return figure


def pareto(runs: Sequence[Run]) -> Figure:
    """Best validation against training FLOPs: every validation faint, and per objective the frontier of what it
    reaches for a compute budget."""
    objectives = sorted({run.objective for run in runs})
    with plt.rc_context(RC):
        figure, panel = plt.subplots(figsize=(6.6, 4.3), layout="constrained")
        for objective in objectives:
            members = [run for run in runs if run.objective == objective and run.valid]
            if not members:
                continue
            style = objective_style(objective, objectives)
            x = np.concatenate([run.column("flops") for run in members])
            y = np.concatenate([run.column("nll") for run in members])
            keep = (x > 0) & np.isfinite(y)
            panel.scatter(x[keep], y[keep], s=10, color=style.color, alpha=0.25, marker=style.marker, linewidths=0)
            front_x, front_y = frontier(x[keep], y[keep])
            name = f"{objective.upper()} frontier – {members[0].label}, {count_seeds(members)}"
            panel.step(front_x, front_y, where="post", color=style.color, linestyle=style.dash, label=name)
            panel.plot(front_x, front_y, linestyle="none", marker=style.marker, color=style.color, markersize=4)
        _log_axis(panel, "training FLOPs (6·N·D)")
        panel.set_ylabel("validation, nats per token")
        panel.set_title("What a compute budget reaches")
        _limit_height(panel, runs)
        figure_legend(figure, panel)
    return figure


def count_seeds(runs: Sequence[Run]) -> str:
    """How many seeds stand behind each of these runs: "1 seed", "3 seeds", "1 to 3 seeds"."""
    counts = sorted({max(1, len(run.seeds)) for run in runs})
    return f"{' to '.join(str(count) for count in (counts[0], counts[-1])[: len(counts)])} seed{'s' * (counts[-1] > 1)}"


def frontier(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that no cheaper point beats: sorted by x, with y strictly falling."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(y)[:-1]])
    keep = y < before
    return x[keep], y[keep]


def contour_sets(runs: Sequence[Run]) -> list[tuple[str, int, list[Run]]]:
    """(objective, unique tokens, runs) where there are enough runs for contours: 3 sizes and 8 validations."""
    sets = []
    for objective, unique in sorted({(run.objective, run.unique_tokens) for run in runs}):
        members = [run for run in runs if (run.objective, run.unique_tokens) == (objective, unique) and run.valid]
        points = sum(len(run.valid) for run in members)
        if len({run.parameters for run in members}) >= 3 and points >= 8:
            sets.append((objective, unique, members))
    return sets


def iso_loss(runs: Sequence[Run]) -> Figure | None:
    """Iso-loss contours over epochs and parameters, one panel per objective and budget; None without enough runs.

    A point is a validation along a run; where several runs of one size meet at an epoch the best counts.
    """
    sets = contour_sets(runs)[:6]
    if not sets:
        return None
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    with plt.rc_context(RC):
        figure, grid = plt.subplots(
            rows, columns, figsize=(1.0 + 3.6 * columns, 0.6 + 3.3 * rows), squeeze=False, layout="constrained"
        )
        for panel, (objective, unique, members) in zip(grid.flat, sets):
            _draw_contours(panel, members)
            title = f"{objective.upper()}, {format_count(unique)} tokens\n{members[0].label}, nats/token, {count_seeds(members)}"
            panel.set_title(title)
        for panel in grid.flat[len(sets) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("parameters")
    return figure


def save(figure: Figure, stem: Path) -> bytes:
    """Write ``stem``.png (200 dpi) and ``stem``.svg, close the figure, and return the SVG's bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=200)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return stem.with_suffix(".svg").read_bytes()


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


def _draw_contours(panel: Axes, members: Sequence[Run]) -> None:
    cells: dict[tuple[float, int], float] = {}
    for run in members:
        for row in run.valid:
            if row.epoch > 0 and np.isfinite(row.nll):
                key = (round(float(np.log10(row.epoch)), 3), run.parameters)
                cells[key] = min(cells.get(key, np.inf), row.nll)
    epochs = 10 ** np.array([key[0] for key in cells])
    sizes = np.array([key[1] for key in cells], dtype=np.float64)
    losses = np.array(list(cells.values()))
    # Early validations are far above the rest and would take all the levels.
    levels = np.linspace(losses.min(), np.quantile(losses, 0.8), 9)
    shades = matplotlib.colormaps["cividis_r"](np.linspace(0.0, 0.75, 64))  # labels stay readable on the darkest
    x, y = np.log10(epochs), np.log10(sizes)
    filled = panel.tricontourf(x, y, losses, levels=levels, cmap=ListedColormap(shades), extend="max")
    lines = panel.tricontour(x, y, losses, levels=levels, colors="black", linewidths=0.6)
    panel.clabel(lines, fontsize=7, fmt="%.2f")
    panel.plot(x, y, ".", color="black", markersize=2, alpha=0.5)
    best = int(np.argmin(losses))
    panel.plot(x[best], y[best], "*", markersize=13, color="white", markeredgecolor="black", clip_on=False, zorder=5)
    panel.set_xlabel("epochs")
    ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if epochs.min() <= tick <= epochs.max()]
    panel.set_xticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    shown = np.unique(sizes)
    panel.set_yticks(np.log10(shown), [format_count(size) for size in shown])
    panel.grid(visible=False)
    panel.figure.colorbar(filled, ax=panel, shrink=0.85, format="%.2f")


def _log_axis(panel: Axes, label: str) -> None:
    panel.set_xscale("log")
    panel.set_xlabel(label)
    if "FLOPs" in label:
        return
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = panel.get_xlim()
    if high / low < 100:
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
        panel.set_xticks(ticks)
    panel.xaxis.set_minor_formatter(NullFormatter())


def _limit_height(panel: Axes, runs: Sequence[Run], below: float = 1.0) -> None:
    """Fit the height to the validation curves: the first steps and an overfitted training loss lie outside.

    ``below`` is the room under the best validation, in margins.
    """
    values = np.concatenate([run.column("nll") for run in runs] or [np.array([])])
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low = float(values.min())
    high = min(float(values.max()), low + 4.0)
    margin = max(0.08 * (high - low), 0.02)
    panel.set_ylim(low - below * margin, high + margin)


def figure_legend(figure: Figure, panel: Axes, columns: int = 4) -> None:
    """The legend of a panel, below the figure."""
    handles, labels = panel.get_legend_handles_labels()
    columns = min(columns, max(1, len(labels)))
    figure.legend(handles[:MAX_LEGEND], labels[:MAX_LEGEND], loc="outside lower center", ncols=columns)


def _sized_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """One entry per objective and size, not per run; the panels say how many seeds."""
    seen: dict[str, Any] = {}
    for run, style in zip(runs, run_styles(runs)):
        seen.setdefault(
            f"{run.objective.upper()} {run.size_name} – {run.label}",
            plt.Line2D([], [], color=style.color, linestyle=style.dash, marker=style.marker, markersize=4),
        )
    figure.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=3)


def _lightness(color: str, position: float) -> str:
    """``position`` 0 is the lightest shade of a colour, 1 a dark one."""
    rgb = np.array(to_rgb(color))
    if position < 0.5:
        rgb = rgb + (1 - rgb) * 0.5 * (1 - 2 * position)
    else:
        rgb = rgb * (1 - 0.45 * (2 * position - 1))
    red, green, blue = rgb.tolist()
    return to_hex((red, green, blue))
