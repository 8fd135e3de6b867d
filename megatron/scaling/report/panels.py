"""A chart is a list of panels: side by side in the files beside the page, one picture each in the page, which stacks them on a
phone and sets the legend as text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from megatron.scaling.report.style import RC, fitting_legend

SINGLE = (4.2, 3.2)
"""Inches of a panel in the page: letters of 9.5 points stay readable where it is as wide as a phone."""


@dataclass(frozen=True)
class Panel:
    """``draw`` fills one set of axes, labels and title included; ``title`` says in words what it shows; ``height`` in inches."""

    title: str
    draw: Callable[[Axes], None]
    height: float = SINGLE[1]


@dataclass(frozen=True)
class Chart:
    """Panels that belong together.

    Attributes:
        stem: name of its files.
        caption: what it shows and what to mind.
        panels: at least one.
        columns: of the panels in the files.
        share_y: the panels have one vertical axis.
        legend: {name: handle}; empty: what the panels name.
        legend_columns: at most, in the files.
    """

    stem: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 3
    share_y: bool = False
    legend: Mapping[str, Any] = field(default_factory=dict)
    legend_columns: int = 4


def compose(chart: Chart) -> Figure:
    """All panels side by side with one legend below, for papers and slides."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = max(panel.height for panel in chart.panels)
    size = (6.6, 1.1 + height) if len(chart.panels) == 1 else (1.0 + 4.4 * columns, 0.9 + (0.2 + height) * rows)
    with plt.rc_context(RC):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharey=chart.share_y, squeeze=False, layout="constrained"
        )
        for axes, panel in zip(grid.flat, chart.panels):
            panel.draw(axes)
        for axes in grid.flat[len(chart.panels) :]:
            axes.set_visible(False)
        if chart.share_y:
            for axes in grid[:, 1:].flat:
                axes.set_ylabel("")
        fitting_legend(figure, _named(chart, grid.flat), chart.legend_columns)
    return figure


def save(chart: Chart, folder: Path) -> str:
    """Write the chart's PNG (200 dpi) and SVG into ``folder``, and return it as HTML for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = compose(chart)
    named = _named(chart, figure.axes)
    figure.savefig(folder / f"{chart.stem}.png", dpi=200)
    figure.savefig(folder / f"{chart.stem}.svg", metadata={"Date": None})
    plt.close(figure)
    keys = "".join(f"<li>{_picture(_swatch(handle), '')}{html.escape(name)}</li>" for name, handle in named.items())
    panels = "".join(_picture(_alone(panel), panel.title) for panel in chart.panels)
    return (
        f'<figure id="{chart.stem}"><div class="panels">{panels}</div><ul class="legend">{keys}</ul>'
        f"<figcaption>{html.escape(chart.caption)} Files: {chart.stem}.png, {chart.stem}.svg.</figcaption></figure>"
    )


def _named(chart: Chart, axes: Any) -> dict[str, Any]:
    """{name: handle} of the legend, each name once."""
    if chart.legend:
        return dict(chart.legend)
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    # Curves with error bars are runs; they come before what explains their marks.
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], ErrorbarContainer)))


def _alone(panel: Panel) -> bytes:
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(SINGLE[0], panel.height), layout="constrained")
        panel.draw(axes)
    return _svg(figure)


def _swatch(handle: Any) -> bytes:
    """The line and marker of a legend entry, without its name."""
    with plt.rc_context(RC):
        figure = Figure(figsize=(0.5, 0.2))
        figure.legend([handle], [""], loc="center", handlelength=3.4, borderpad=0, handletextpad=0, borderaxespad=0)
    return _svg(figure, transparent=True)


def _svg(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with plt.rc_context(RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    plt.close(figure)
    return buffer.getvalue()


def _picture(svg: bytes, alt: str) -> str:
    data = base64.b64encode(svg).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
