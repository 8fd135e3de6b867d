#!/usr/bin/env python3
"""Which of AR and masked diffusion to train on given data and compute, how large and how long, and what it costs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.config.presets import PRESETS
from megatron.runs.reading import format_count, parse_count
from megatron.scaling.fit import Fit, load_fits
from megatron.scaling.literature import PUBLISHED
from megatron.scaling.planner import DEVICES, Model, Plan, device_hours, make_plan, preset_sizes


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        models: dict[str, Model] = dict(PUBLISHED)
        if options.fits:
            fits: dict[str, Fit] = {fit.objective: fit for fit in load_fits(options.fits)}
            models.update({name: fit for name, fit in fits.items() if name in models})
        sizes = _sizes(options.sizes)
        if not 0 < options.mfu <= 1 or options.devices < 1:
            raise ValueError(
                f"MFU {options.mfu:g} on {options.devices} devices was given; MFU is in (0, 1], devices at least 1"
            )
        plan = make_plan(models, unique_tokens=parse_count(options.unique_tokens), flops=options.flops, sizes=sizes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_finite(asdict(plan)), indent=1))
    else:
        print(_text(plan, options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--unique-tokens", required=True, metavar="TOKENS", help="tokens of data, such as 100M or 1e8")
    add("--flops", type=float, required=True, metavar="FLOPS", help="training compute (6*N*D), such as 1e20")
    add("--fits", type=Path, metavar="FILE", help="fits of tools/fit_laws.py; default: published coefficients")
    add("--sizes", nargs="+", metavar="SIZE", help="presets or parameter counts to choose from, such as 140M or 2.5e6")
    add("--device", choices=sorted(DEVICES), default="H100", help="for the cost (default: %(default)s)")
    add("--peak-tflops", type=float, metavar="TFLOPS", help="peak of one device, instead of --device")
    add("--devices", type=int, default=8, metavar="COUNT", help="devices used at once (default: %(default)s)")
    add("--mfu", type=float, default=0.4, metavar="FRACTION", help="share of the peak reached (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def _sizes(names: list[str] | None) -> dict[str, float]:
    """Sizes to choose from, by name: presets, or bare numbers of parameters."""
    presets = preset_sizes()
    if not names:
        return presets
    sizes = {}
    for name in names:
        try:
            sizes[name] = presets[name] if name in presets else parse_count(name)
        except ValueError:
            raise ValueError(
                f"size {name!r} was given; a size is a number of parameters or a preset: {', '.join(PRESETS)}"
            ) from None
    return sizes


def _text(plan: Plan, options: argparse.Namespace) -> str:
    peak = options.peak_tflops * 1e12 if options.peak_tflops else DEVICES[options.device]
    name = f"{options.peak_tflops:g} TFLOP/s device" if options.peak_tflops else options.device
    lines = [
        f"{format_count(plan.unique_tokens)} unique tokens, {plan.flops:.3g} FLOPs",
        f"Train: {plan.recommended.upper()} ({plan.reason})",
        f"MDM overtakes AR on this much data at {plan.critical} FLOPs"
        + ("" if math.isfinite(plan.critical.value) else " (not below 1e28)"),
    ]
    for objective, choice in plan.choices.items():
        device_h, wall_h = device_hours(choice.flops, peak_flops=peak, mfu=options.mfu, devices=options.devices)
        lines += [
            "",
            f"{objective.upper()}: {choice.size} ({format_count(choice.parameters)} parameters), {choice.epochs:.3g} epochs, "
            f"{format_count(choice.tokens)} tokens, {choice.flops:.3g} FLOPs",
            f"  predicted {choice.loss} nats/token, {choice.label}"
            + (" (range: the error of these coefficients at the paper's best run)" if plan.probability is None else ""),
            f"  cost {device_h:.3g} {name} hours, {wall_h:.3g} h on {options.devices} at {options.mfu:.0%} MFU",
            f"  source: {choice.source}",
        ]
        if choice.optimal_epochs is not None:
            lines.append(f"  lowest loss of this size at {choice.optimal_epochs:.4g} epochs")
        lines += [f"  note: {note}" for note in choice.notes]
    return "\n".join([*lines, "", *[f"note: {note}" for note in plan.notes]])


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
