"""How figures look, for screen, print and colour-blind readers (matplotlib without a display).

Objectives differ in hue (Okabe-Ito palette), line style and marker, so a grey print loses nothing; sizes of one
objective differ in lightness and marker fill. Every legend entry says whether its numbers are exact or a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megatron.runs.run import Run

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

_BASE: dict[str, tuple[str, Any, str]] = {"ar": ("#0072B2", "-", "o"), "mdm": ("#D55E00", (0, (6, 2)), "s")}
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
    """How the line of a run is drawn: colours in hexadecimal, ``fill`` of its markers."""

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


def count_seeds(runs: Sequence[Run]) -> str:
    """How many seeds stand behind each of these runs: "1 seed", "3 seeds", "1 to 3 seeds"."""
    counts = sorted({max(1, len(run.seeds)) for run in runs})
    return f"{' to '.join(str(count) for count in (counts[0], counts[-1])[: len(counts)])} seed{'s' * (counts[-1] > 1)}"


def log_axis(panel: Axes, label: str) -> None:
    """Make an axis logarithmic, with ticks that do not overlap."""
    panel.set_xscale("log")
    panel.set_xlabel(label)
    panel.xaxis.set_minor_formatter(NullFormatter())
    if "FLOPs" in label:
        panel.xaxis.set_major_locator(LogLocator(numticks=6))
        return
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = panel.get_xlim()
    if high / low < 100:
        for leading in ((1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
            ticks = [digit * 10.0**power for power in range(-1, 4) for digit in leading]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) > 2:
                break
        panel.set_xticks(ticks)
        panel.xaxis.set_minor_formatter(NullFormatter())


def limit_height(panel: Axes, runs: Sequence[Run], below: float = 1.0) -> None:
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


def fitting_legend(figure: Figure, named: Mapping[str, Any], columns: int) -> None:
    """A legend of {name: handle} below the figure, in as many columns as the figure's width holds; what is more than
    ``MAX_LEGEND`` entries is counted."""
    entries = dict(list(named.items())[:MAX_LEGEND])
    if len(named) > MAX_LEGEND:
        entries[f"and {len(named) - MAX_LEGEND} more (all are in the page)"] = plt.Line2D([], [], linestyle="none")
    for count in range(min(columns, max(1, len(entries))), 0, -1):
        legend = figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=count)
        if count == 1 or legend.get_window_extent().width <= 0.98 * figure.bbox.width:
            return
        legend.remove()


def _lightness(color: str, position: float) -> str:
    """``position`` 0 is the lightest shade of a colour, 1 a dark one."""
    rgb = np.array(to_rgb(color))
    if position < 0.5:
        rgb = rgb + (1 - rgb) * 0.5 * (1 - 2 * position)
    else:
        rgb = rgb * (1 - 0.45 * (2 * position - 1))
    red, green, blue = rgb.tolist()
    return to_hex((red, green, blue))
