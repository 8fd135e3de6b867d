"""Which of AR and masked diffusion to train on given data and compute, how large and how long, and what it costs."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser, named
from megatron.config.ranges import real, refuse_idle, whole
from megatron.config.usage import suggestion
from megatron.errors import UserError, require
from megatron.model.arithmetic import DEVICES
from megatron.screen import wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.scaling.fit import Fit
    from megatron.scaling.planner import Choice, Plan


EXAMPLES = (
    "megatron plan --unique-tokens 100M --flops 1e20",
    "megatron plan --unique-tokens 2B --gpu-hours 500 --device H100",
)


def main(arguments: list[str] | None = None) -> None:
    """Plan and print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    refuse_idle(parser, options, {} if options.peak_tflops is None else {"device": "--peak-tflops stands in its place"})
    plan = _plan(options)
    print(json.dumps(_finite(asdict(plan)), indent=1) if options.json else wrapped(_text(plan, options)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("--unique-tokens", required=True, metavar="TOKENS", help="tokens of data, such as 100M or 1e8")
    compute = parser.add_mutually_exclusive_group(required=True)
    compute.add_argument("--flops", metavar="FLOPS", help="training compute (6*N*D), such as 1e20")
    compute.add_argument(
        "--gpu-hours", metavar="HOURS", help="the same as hours of one --device, times their number, at --mfu"
    )
    add("--fits", type=Path, metavar="FILE", help="fits of tools/fit_laws.py; default: published coefficients")
    add("--sizes", nargs="+", metavar="SIZE", help="presets or parameter counts to choose from, such as 140M or 2.5e6")
    add("--vocab-size", type=whole(2, 10**9), default=50257, metavar="TOKENS",
        help="no predicted loss above ln of this, which guessing costs (default: %(default)s)")  # fmt: skip
    add("--device", default="H100", metavar="NAME", help=f"one of {', '.join(DEVICES)} (default: %(default)s)")
    add("--peak-tflops", type=real(0, 10**9), metavar="TFLOPS", help="peak of one device, instead of --device")
    add(
        "--devices",
        type=whole(1, 10**9),
        default=8,
        metavar="COUNT",
        help="devices used at once (default: %(default)s)",
    )
    add(
        "--mfu",
        type=real(0, 1),
        default=0.4,
        metavar="FRACTION",
        help="share of the peak reached (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    from megatron.runs.counts import parse_count
    from megatron.scaling.literature import PUBLISHED
    from megatron.scaling.planner import Budget, Model, make_plan

    models: dict[str, Model] = dict(PUBLISHED)
    if options.fits:
        models |= _fitted(options.fits, models)
    unique = parse_count(options.unique_tokens, "--unique-tokens")
    given = f"--unique-tokens {options.unique_tokens}"
    require(
        unique >= 1e4, given, "a model is trained on 10k tokens or more", "write the number of tokens, such as 100M"
    )
    budget = Budget(
        unique_tokens=unique,
        flops=_flops(options),
        sizes=_sizes(options.sizes),
        vocab_size=options.vocab_size,
    )
    return make_plan(models, budget)


def _fitted(path: Path, objectives: Iterable[str]) -> dict[str, Fit]:
    """The law of each objective in a file of fits, of one source as far as there are several; those of other objectives are of no
    use here."""
    from megatron.scaling.fit import load_fits, of_one_source

    found = [fit for fit in load_fits(path) if fit.objective in objectives]
    require(found, f"--fits {path}", "a plan weighs ar against mdm, and it holds a law of neither", "fit such runs")
    for (_, objective), number in Counter((fit.source, fit.objective) for fit in found).items():
        given = f"--fits {path} holds two laws of {objective}"
        require(number == 1, given, "a plan takes one", "fit those runs alone: tools/fit_laws.py RUN ...")
    return {fit.objective: fit for fit in found} | of_one_source(found)


def _flops(options: argparse.Namespace) -> float:
    """The compute, however it was given; numbers that are another unit's are refused."""
    from megatron.runs.counts import parse_count

    peak, name = _peak(options)
    if options.flops is not None:
        flops = parse_count(options.flops, "--flops")
        given, hours = f"--flops {options.flops}", flops / peak / options.mfu / 3600
        fix = "write FLOPs such as 1e20, or --gpu-hours HOURS"
        require(flops >= 1e12, given, f"a {name} computes that in {flops / peak:.1g} s", fix)
        require(hours < 1e12, given, f"a {name} computes that in {hours:.1g} hours", fix)
        return flops
    hours = parse_count(options.gpu_hours, "--gpu-hours", least=1e-3)
    given = f"--gpu-hours {options.gpu_hours}"
    require(hours < 1e10, given, "no cluster has so many hours", "write hours such as 500, or --flops FLOPS")
    return hours * 3600 * peak * options.mfu


def _sizes(names: list[str] | None) -> dict[str, float]:
    """Sizes to choose from, by name: presets, or bare numbers of parameters."""
    from megatron.runs.counts import parse_count
    from megatron.scaling.planner import preset_sizes

    presets = preset_sizes()
    names = [named(name, presets) for name in names or []]
    if not names:
        return presets
    sizes = {}
    for name in names:
        try:
            sizes[name] = presets[name] if name in presets else parse_count(name)
        except UserError:
            raise UserError(
                f"size {name!r} was given",
                "a size is a number of parameters from 1, or a preset",
                f"presets: {', '.join(presets)}",
            ) from None
    return sizes


def _peak(options: argparse.Namespace) -> tuple[float, str]:
    """(peak in FLOP/s, name) of the device."""
    if options.peak_tflops is not None:
        given = options.peak_tflops
        return given * 1e12, f"{given:g} TFLOP/s device"
    device = named(options.device, DEVICES)
    require(
        device in DEVICES,
        f"--device {options.device}",
        f"known are {', '.join(sorted(DEVICES))}",
        suggestion(options.device, DEVICES) or "choose one or give --peak-tflops",
    )
    return DEVICES[device].peak, device


def _text(plan: Plan, options: argparse.Namespace) -> str:
    from megatron.runs.counts import format_count

    peak, name = _peak(options)
    hours = plan.flops / peak / options.mfu / 3600
    lines = [
        _answer(plan, options),
        "",
        f"Given: {format_count(plan.unique_tokens)} unique tokens; {plan.flops:.3g} FLOPs, {hours:.3g} {name} hours at "
        f"{options.mfu:.0%} MFU ({peak / 1e12:g} TFLOP/s at most)",
        f"Why {plan.recommended.upper()}: {plan.reason}",
        f"MDM overtakes AR on this much data at {plan.critical} FLOPs"
        + ("" if math.isfinite(plan.critical.value) else " (not below 1e28)"),
    ]
    for objective, choice in plan.choices.items():
        lines += ["", f"{objective.upper()}, {choice.label}"]
        if choice.cheapest is None:
            lines += _choice_lines("lowest predicted loss", choice, options)
        else:
            share = choice.cheapest.flops / choice.flops
            lines += _choice_lines(
                f"cheapest within one standard error, {share:.2g} of the compute", choice.cheapest, options
            )
            lines += _choice_lines("lowest predicted loss", choice, options)
        lines.append(f"  source: {choice.source}")
        notes = dict.fromkeys(note for part in (choice.advised, choice) for note in part.notes)
        lines += [f"  note: {note}" for note in notes]
    if plan.probability is None:
        lines += ["", "note: The ranges are the error of the published coefficients at the paper's best runs."]
    return "\n".join([*lines, *([] if plan.probability is None else [""]), *[f"note: {note}" for note in plan.notes]])


def _answer(plan: Plan, options: argparse.Namespace) -> str:
    """What to do, in one sentence."""
    from megatron.runs.counts import format_count
    from megatron.scaling.planner import device_hours

    peak, name = _peak(options)
    choice = plan.choices[plan.recommended].advised
    device_h, wall_h = device_hours(choice.flops, peak_flops=peak, mfu=options.mfu, devices=options.devices)
    who = f"{plan.recommended.upper()} {choice.size}"
    lead = f"AR and MDM are too close to call; if one, train {who}" if plan.is_close else f"Train {who}"
    return (
        f"{lead} for {_plain(choice.epochs)} epochs of your {format_count(plan.unique_tokens)} tokens: {_plain(device_h)} {name} "
        f"hours ({_plain(wall_h)} h on {options.devices}), predicted {choice.label} {choice.loss} nats/token."
    )


def _choice_lines(title: str, choice: Choice, options: argparse.Namespace) -> list[str]:
    from megatron.runs.counts import format_count
    from megatron.scaling.planner import device_hours

    peak, name = _peak(options)
    device_h, wall_h = device_hours(choice.flops, peak_flops=peak, mfu=options.mfu, devices=options.devices)
    lines = [
        f"  {title}:",
        f"    {choice.size} ({format_count(choice.parameters)} parameters), {_plain(choice.epochs)} epochs, "
        f"{format_count(choice.tokens)} tokens, {choice.flops:.3g} FLOPs",
        f"    predicted {choice.loss} nats/token; {_plain(device_h)} {name} hours, {_plain(wall_h)} h on {options.devices} "
        f"at {options.mfu:.0%} MFU",
    ]
    if choice.optimal_epochs is not None:
        lines.append(f"    lowest loss of this size at {_plain(choice.optimal_epochs)} epochs")
    return lines


def _plain(value: float) -> str:
    """Three digits without an exponent where a person counts: 1,040 epochs."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
