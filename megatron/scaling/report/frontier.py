"""What a compute budget reaches, and lines of equal loss over epochs and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from megatron.runs.counts import format_count
from megatron.runs.run import Run
from megatron.scaling.report.panels import Chart, Panel
from megatron.scaling.report.style import count_seeds, first_budgets, limit_height, log_axis, objective_style

MAX_CONTOURS = 12


def pareto(runs: Sequence[Run]) -> Chart:
    """Best validation against training FLOPs, one panel per budget of unique tokens (at most six): every validation faint,
    and per objective the frontier of what it reaches for a compute budget, drawn on to the largest compute of the panel."""
    budgets, rest = first_budgets([run for run in runs if run.valid])
    return Chart(
        "pareto",
        "Every validation of every run (faint) and the lowest loss that each objective reaches for a compute "
        "budget, one panel per budget of unique tokens; it goes on flat, because a larger budget reaches what a smaller "
        "one does. Points along a run are taken before its learning rate has decayed, so the frontier is what these runs "
        f"reach, not the best possible.{rest}",
        [Panel(f"Frontier on {format_count(size)} unique tokens", partial(_draw_pareto, runs=runs, budget=size))
         for size in budgets],
        share_y=True,
    )  # fmt: skip


def _draw_pareto(panel: Axes, *, runs: Sequence[Run], budget: int) -> None:
    objectives = sorted({run.objective for run in runs})
    members = [run for run in runs if run.unique_tokens == budget and run.valid]
    most = max(float(run.column("flops").max()) for run in members)
    for objective in objectives:
        of_objective = [run for run in members if run.objective == objective]
        if of_objective:
            _draw_frontier(panel, of_objective, objectives, most)
    panel.set_title(f"{format_count(budget)} unique tokens, {count_seeds(members)}")
    log_axis(panel, "training FLOPs (6·N·D)")
    limit_height(panel, runs)
    panel.set_ylabel("validation, nats per token")


def _draw_frontier(panel: Axes, runs: Sequence[Run], objectives: Sequence[str], most_flops: float) -> None:
    """Validations of one objective, and their frontier up to ``most_flops``: a larger budget reaches what a smaller does."""
    style = objective_style(runs[0].objective, objectives)
    x = np.concatenate([run.column("flops") for run in runs])
    y = np.concatenate([run.column("nll") for run in runs])
    keep = (x > 0) & np.isfinite(y)
    panel.scatter(x[keep], y[keep], s=10, color=style.color, alpha=0.25, marker=style.marker, linewidths=0)
    front_x, front_y = frontier(x[keep], y[keep])
    if not front_x.size:
        return
    name = f"{runs[0].objective.upper()} frontier – {runs[0].label}"
    reach = (np.append(front_x, most_flops), np.append(front_y, front_y[-1]))
    panel.step(*reach, where="post", color=style.color, linestyle=style.dash, linewidth=1.4, label=name)
    panel.plot(front_x, front_y, linestyle="none", marker=style.marker, color=style.color, markersize=3.5)


def frontier(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that no cheaper point beats: sorted by x, with y strictly falling."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(y)[:-1]])
    keep = y < before
    return x[keep], y[keep]


def contour_sets(runs: Sequence[Run]) -> list[tuple[str, int, list[Run]]]:
    """(objective, unique tokens, runs) where there are enough runs for contours: 3 sizes, 8 validations that are not all on one
    line of epochs and sizes (as finished runs of one epoch are), and losses that differ."""
    sets = []
    for objective, unique in sorted({(run.objective, run.unique_tokens) for run in runs}):
        members = [run for run in runs if (run.objective, run.unique_tokens) == (objective, unique) and run.valid]
        x, y, losses = surface(members)
        spans = np.linalg.matrix_rank(np.stack([x - x[:1], y - y[:1]])) == 2
        if len({*y}) >= 3 and len(losses) >= 8 and spans and losses.min() < np.quantile(losses, 0.8):
            sets.append((objective, unique, members))
    return sets


def surface(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms (to 10) of epochs and of parameters, and the lowest loss there, each [places]."""
    cells: dict[tuple[float, float], float] = {}
    for run in runs:
        for row in run.valid:
            if row.epoch > 0 and np.isfinite(row.nll):
                place = (round(float(np.log10(row.epoch)), 3), float(np.log10(run.parameters)))
                cells[place] = min(cells.get(place, np.inf), row.nll)
    x, y = np.array(list(cells), dtype=np.float64).reshape(-1, 2).T
    return x, y, np.array(list(cells.values()), dtype=np.float64)


def iso_loss(runs: Sequence[Run]) -> Chart | None:
    """Iso-loss contours over epochs and parameters, one panel per objective and budget; None without enough runs.

    A point is a validation along a run; where several runs of one size meet at an epoch the best counts.
    """
    found = contour_sets(runs)
    sets = found[:MAX_CONTOURS]
    if not sets:
        return None
    rest = f" {len(found) - len(sets)} more sets of runs are not drawn." if len(found) > len(sets) else ""
    return Chart(
        "iso_loss",
        "Lines of equal validation loss, nats per token, over epochs and parameters; dots are measurements, the star is the "
        f"best. Between dots the surface is linear interpolation.{rest}",
        [
            Panel(f"Iso-loss lines of {objective.upper()}", partial(_draw_contours, members=members))
            for objective, _, members in sets
        ],
    )


def _draw_contours(panel: Axes, *, members: Sequence[Run]) -> None:
    first = members[0]
    title = (
        f"{first.objective.upper()}, {format_count(first.unique_tokens)} tokens, {count_seeds(members)}\n{first.label}"
    )
    panel.set_title(title)
    panel.set_ylabel("parameters")
    x, y, losses = surface(members)
    # Early validations are far above the rest and would take all the levels.
    levels = np.linspace(losses.min(), np.quantile(losses, 0.8), 9)
    shades = matplotlib.colormaps["cividis_r"](np.linspace(0.0, 0.75, 64))  # labels stay readable on the darkest
    filled = panel.tricontourf(x, y, losses, levels=levels, cmap=ListedColormap(shades), extend="max")
    lines = panel.tricontour(x, y, losses, levels=levels, colors="black", linewidths=0.6)
    panel.clabel(lines, fontsize=7, fmt="%.2f")
    panel.plot(x, y, ".", color="black", markersize=2, alpha=0.5)
    best = int(np.argmin(losses))
    panel.plot(x[best], y[best], "*", markersize=13, color="white", markeredgecolor="black", clip_on=False, zorder=5)
    panel.set_xlabel("epochs")
    ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if 10 ** x.min() <= tick <= 10 ** x.max()]
    panel.set_xticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    shown = np.unique(y)
    panel.set_yticks(shown, [format_count(size) for size in 10**shown])
    panel.grid(visible=False)
    panel.figure.colorbar(filled, ax=panel, shrink=0.85, format="%.2f")
