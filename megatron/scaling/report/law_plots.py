"""Figures of fitted laws: what repeated data is worth, and from which compute on MDM overtakes AR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron.runs.comparison import comparisons
from megatron.runs.counts import format_count
from megatron.runs.run import Run
from megatron.scaling.chinchilla import DataConstrained
from megatron.scaling.fit import Fit
from megatron.scaling.literature import CRITICAL_RANGE_TOKENS, PUBLISHED, critical_flops
from megatron.scaling.predict import critical_compute
from megatron.scaling.report.panels import Chart, Panel
from megatron.scaling.report.style import objective_style


def data_value(fits: Sequence[Fit]) -> Chart:
    """Worth of repeated data against epochs: effective unique epochs D'/U of data-constrained fits with their 95 %
    interval (alone where the runs leave R_D open), and the published half-lives, dotted thin. The diagonal is data as good
    as new."""
    return Chart(
        "data_value",
        "How many epochs of new data the repeated data is worth. Shaded: 95 % interval of the fit; dotted: published "
        "half-lives, not measured here.",
        [Panel("What repeated data is worth", partial(_draw_data_value, fits=fits))],
        legend_columns=2,
    )


def critical_line(ar: Fit | None, mdm: Fit | None, runs: Sequence[Run]) -> Chart:
    """Compute from which MDM is at or below AR, against unique tokens: the published line (with its range marked), the
    fitted crossing with its interval, and where the given runs lie, filled where MDM's number is the lower one."""
    return Chart(
        "critical_compute",
        "Above the line MDM reaches a lower validation number than AR on the same unique tokens. The published line "
        "is quoted; crossings are drawn where the fits of both objectives cross at all.",
        [Panel("Compute from which MDM is at or below AR", partial(_draw_critical_line, ar=ar, mdm=mdm, runs=runs))],
        legend_columns=2,
    )


def _draw_data_value(panel: Axes, *, fits: Sequence[Fit]) -> None:
    epochs = np.geomspace(1, 1000, 200)
    panel.plot(epochs, epochs, color="#999999", linewidth=1.0, label="as good as new")
    for objective, coefficients in PUBLISHED.items():
        rate = coefficients.values["R_D"]
        style = objective_style(objective)
        name = f"{objective.upper()} published, R_D = {rate:g}"
        panel.plot(epochs, _worth(epochs, rate), color=style.color, linewidth=1.0, linestyle=":", label=name)
    for fit in fits:
        if not isinstance(fit.law, DataConstrained):
            continue
        style = objective_style(fit.objective)
        rates = fit.samples[:, fit.law.names.index("R_D")]
        low, high = np.quantile(_worth(epochs[None], rates[:, None]), [0.025, 0.975], axis=0)
        found = fit.interval("R_D")
        name = f"{fit.objective.upper()} – {fit.label}, R_D = {found}"
        is_open = found.is_open
        panel.fill_between(epochs, low, high, color=style.color, alpha=0.18, linewidth=0, label=name if is_open else "")
        if is_open:
            continue
        worth = _worth(epochs, found.value)
        panel.plot(epochs, worth, color=style.color, linestyle=style.dash, label=name)
    panel.set(xscale="log", yscale="log", xlabel="epochs", ylabel="worth in epochs of new data (D'/U)")
    panel.set_title("What repeated data is worth")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_critical_line(panel: Axes, *, ar: Fit | None, mdm: Fit | None, runs: Sequence[Run]) -> None:
    budgets = sorted({run.unique_tokens for run in runs})
    low, high = CRITICAL_RANGE_TOKENS
    reach = np.geomspace(min([*budgets, low]) / 2, max([*budgets, high]) * 2, 400)
    line = np.array([critical_flops(value) for value in reach])
    inside = (reach >= low) & (reach <= high)
    panel.plot(reach, line, color="#777777", linewidth=1.0, linestyle=":", label="published line, extrapolated")
    panel.plot(reach[inside], line[inside], color="#444444", linewidth=2.2, label="published line (arXiv 2507.15857)")
    if ar is not None and mdm is not None:
        _fitted_crossings(panel, ar, mdm, budgets)
    _mark_runs(panel, runs)
    panel.set(xscale="log", yscale="log", xlabel="unique tokens", ylabel="training FLOPs (6·N·D)")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    panel.set_title("MDM (bound) at or below AR (exact)")


def _worth(epochs: np.ndarray, rate: np.ndarray | float) -> np.ndarray:
    return 1 - rate * np.expm1(-(epochs - 1) / rate)


def _fitted_crossings(panel: Axes, ar: Fit, mdm: Fit, budgets: Sequence[int]) -> None:
    """Crossings at up to five budgets of the runs; a crossing at infinity is not drawn."""
    chosen = sorted({budgets[round(i)] for i in np.linspace(0, len(budgets) - 1, min(5, len(budgets)))})
    label = "fitted crossing, 95 % interval"
    for unique in chosen:
        found = critical_compute(ar, mdm, unique)
        if not math.isfinite(found.value):
            continue
        high = found.high if math.isfinite(found.high) else found.value * 1e3
        error = [[found.value - found.low], [high - found.value]]
        panel.errorbar(unique, found.value, yerr=error, fmt="D", color="#009E73", capsize=3, markersize=6, label=label)
        label = ""


def _mark_runs(panel: Axes, runs: Sequence[Run]) -> None:
    """One marker per budget at the compute of the best MDM run."""
    labels = {True: "runs: MDM lower", False: "runs: AR lower"}
    for first, second in comparisons(runs):
        if second.objective != "mdm" or first.best is None or second.best is None:
            continue
        ahead = second.best.nll <= first.best.nll
        style = objective_style("mdm" if ahead else "ar")
        panel.plot(
            first.unique_tokens, second.best.flops, style.marker, color=style.color, markersize=8,
            markerfacecolor=style.color if ahead else "white", label=labels.pop(ahead, ""), zorder=4,
        )  # fmt: skip
