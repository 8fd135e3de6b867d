"""Losses on seen and unseen documents: over epochs, and by the share of the text that is hidden; one run beside the other."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from megatron.objectives.base import EXACT
from megatron.runs.comparison import comparisons, epoch_text
from megatron.runs.generalisation import Generalisation, Point, gap_difference
from megatron.runs.reading import readable
from megatron.runs.run import Run
from megatron.runs.sums import reach
from megatron.scaling.report.panels import Chart, Panel, save
from megatron.scaling.report.style import LineStyle, log_axis, run_styles
from megatron.scaling.report.tables import section, table
from megatron.statistics import Estimate

MAX_ROWS = 8  # of a run in the table
CAPTION = (
    "Losses of kept checkpoints on documents of the training data (seen, dotted) and of the validation data, without dropout, "
    "with the same masks for both. The gap is unseen minus seen; bars are 95 % intervals over documents and masks. By what is "
    "hidden: how much of a text a masked model does not see while it predicts, and a causal model has not read yet; at the last "
    "checkpoint of each run. Before the end of the first epoch some of the seen documents are still new. Of a bound both losses "
    "are bounds, and their difference is none."
)
Found = Sequence[tuple[Run, Generalisation]]


def generalisation_html(runs: Sequence[Run], folder: Path, left_out: list[str]) -> str:
    """A chart, sentences and numbers of the runs of which ``megatron generalisation`` left a record; nothing without one.

    Args:
        runs: where the records are looked for.
        folder: of the chart's files.
        left_out: receives which cannot be read.
    """
    records = readable(_recorded, runs, left_out)
    found = [(run, record) for run, record in records if record is not None]
    if not found:
        return ""
    sentences = "".join(f"<p>{html.escape(text)}</p>" for text in differences_text(found))
    rows = [_row(run, record, point) for run, record in found for point in _some(record.points)]
    body = save(generalisation_chart(found), folder) + sentences + table(rows, "Seen and unseen documents")
    return section("Seen and unseen documents", body)


def _recorded(run: Run) -> tuple[Run, Generalisation | None]:
    record = Generalisation.load(run.path)
    return run, record if record is not None and record.points else None


def generalisation_chart(found: Found) -> Chart:
    """Both losses and the gap over epochs, and the gap by the share of the text that is hidden."""
    panels = [
        Panel("Losses on seen and unseen documents against epochs", partial(_draw_losses, found=found)),
        Panel("Unseen minus seen against epochs", partial(_draw_gaps, found=found)),
    ]
    if any(math.isfinite(gap.value) for _, record in found for _, gap in _by_bin(record)):
        panels.append(Panel("Unseen minus seen by the share that is hidden", partial(_draw_bins, found=found)))
    return Chart("generalisation", CAPTION, panels)


def differences_text(found: Found) -> list[str]:
    """For each pair of AR and another objective on the same documents: whose gap is wider, where each is best and at the end."""
    records = {run.path: record for run, record in found}
    sentences = []
    for first, second in comparisons([run for run, _ in found]):
        one, other = records[first.path], records[second.path]
        if not one.protocol.is_comparable(other.protocol):
            continue
        said = []
        for where, choose in (("at the lowest loss on unseen documents", _best), ("at the end", _last)):
            ours, theirs = choose(one.points), choose(other.points)
            value = gap_difference(ours, theirs)
            epochs = f"epochs {epoch_text(ours.epoch)} and {epoch_text(theirs.epoch)}"
            said.append(
                f"{where} ({epochs}) {_number(theirs.gap())} against {_number(ours.gap())}, difference {_number(value)}"
            )
        names = [run.name for run in (second, first)]
        sentences.append(
            f"Unseen minus seen, nats per token, {names[0]} against {names[1]}: {'; '.join(said)}; paired, ± 95 %."
        )
    return sentences


def _best(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.loss("unseen").value)


def _last(points: Sequence[Point]) -> Point:
    return points[-1]


def _some(points: Sequence[Point]) -> list[Point]:
    """At most ``MAX_ROWS``, the first, the last and what is evenly between them."""
    places = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_ROWS)).round().astype(int))
    return [points[place] for place in places]


def _row(run: Run, record: Generalisation, point: Point) -> dict[str, str]:
    return {
        "Run": run.name,
        "Epoch": epoch_text(point.epoch),
        "Step": f"{point.step:,}",
        "Kind": record.protocol.kind,
        "Seen, ± 95 %": _number(point.loss("seen")),
        "Unseen, ± 95 %": _number(point.loss("unseen")),
        "Unseen − seen, ± 95 %": _number(point.gap()),
    }


def _number(value: Estimate) -> str:
    half = reach(value)
    return (f"{value.value:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")).replace("-", "−")


def _bar(value: Estimate) -> float:
    half = reach(value)
    return half if math.isfinite(half) else 0.0


def _styles(found: Found) -> list[tuple[Run, Generalisation, LineStyle]]:
    return [(run, record, style) for (run, record), style in zip(found, run_styles([run for run, _ in found]))]


def _label(run: Run, record: Generalisation) -> str:
    return f"{run.name} – {record.protocol.label}" if record.protocol.label == EXACT else f"{run.name} – of bounds"


def _draw_losses(panel: Axes, *, found: Found) -> None:
    for run, record, style in _styles(found):
        points = [point for point in record.points if point.epoch > 0]
        for name, dash, width, size in (("unseen", style.dash, 1.8, 4.5), ("seen", ":", 1.0, 3.0)):
            values = [point.loss(name) for point in points]
            panel.errorbar(
                [point.epoch for point in points], [value.value for value in values], yerr=[_bar(value) for value in values],
                color=style.color, linestyle=dash, linewidth=width, marker=style.marker, markersize=size,
                markerfacecolor=style.fill, capsize=2, elinewidth=1.0, label=f"{_label(run, record)}, {name}",
            )  # fmt: skip
    log_axis(panel, "epochs over the unique tokens")
    panel.set_ylabel("nats per token")
    panel.set_title("Seen and unseen documents")


def _draw_gaps(panel: Axes, *, found: Found) -> None:
    for _, record, style in _styles(found):
        points = [point for point in record.points if point.epoch > 0]
        _errorbar(panel, [point.epoch for point in points], [point.gap() for point in points], style)
    panel.axhline(0, color="#666666", linewidth=0.8)
    log_axis(panel, "epochs over the unique tokens")
    panel.set_ylabel("unseen − seen, nats per token")
    panel.set_title("Generalisation gap")


def _draw_bins(panel: Axes, *, found: Found) -> None:
    for _, record, style in _styles(found):
        known = [(place, gap) for place, gap in _by_bin(record) if math.isfinite(gap.value)]
        _errorbar(panel, [place for place, _ in known], [gap for _, gap in known], style)
    panel.axhline(0, color="#666666", linewidth=0.8)
    panel.set_xlim(0, 1)
    panel.set_xlabel("share of the text that is hidden")
    panel.set_ylabel("unseen − seen, nats per token")
    panel.set_title("Generalisation gap at the last checkpoint")


def _errorbar(panel: Axes, places: Sequence[float], values: Sequence[Estimate], style: LineStyle) -> None:
    panel.errorbar(
        places, [value.value for value in values], yerr=[_bar(value) for value in values], color=style.color,
        linestyle=style.dash, marker=style.marker, markersize=4, markerfacecolor=style.fill, capsize=2, elinewidth=1.0,
    )  # fmt: skip


def _by_bin(record: Generalisation) -> list[tuple[float, Estimate]]:
    """Middle of each bin, and its gap at the last checkpoint; NaN where nothing is of the bin."""
    bins = record.protocol.bins
    return [((part - 0.5) / bins, record.points[-1].gap(part)) for part in range(1, bins + 1)]
