"""Whether a training command fits on GPUs that need not be here, and what it takes: memory a GPU by part, host memory, FLOPs,
hours and cost, checkpoints, open files.

Takes every flag of megatron train. State is what real engines hold, byte for byte; activations are arithmetic; what is
assumed is named. Exit status 1 where it does not fit.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.parser import Parser, named
from megatron.config.ranges import real, whole
from megatron.config.usage import suggestion as nearest
from megatron.errors import require
from megatron.files import replace_file
from megatron.model.arithmetic import DEVICES
from megatron.screen import format_seconds, wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.training.layouts import Suggestion
    from megatron.training.preflight import Case
    from megatron.training.roofline import Cluster

EXAMPLES = (
    "megatron doctor --preflight --gpus 64 --device h100 --objective mdm --model 2298M --bf16 --micro-batch-size 8 "
    "--global-batch-size 1024 --train-iters 10000",
    "megatron doctor --preflight --gpus 8 --model 2298M --bf16 --train-iters 1000 --suggest",
)
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Print what is needed; returns the exit status."""
    options, flags = _parser().parse_known_args(argv)
    device = named(options.device, DEVICES)
    require(
        device in DEVICES,
        f"--device {options.device}",
        f"known are {', '.join(DEVICES)}",
        nearest(options.device, DEVICES) or "choose the one nearest to it",
    )
    from megatron.objectives import parse
    from megatron.training.configuration import recorded
    from megatron.training.preflight import case_of
    from megatron.training.roofline import Cluster

    notes: list[str] = []
    case = case_of(parse(flags, world_size=options.gpus, notes=notes, recorded=recorded), options.gpus)
    cluster = Cluster(DEVICES[device], options.gpus_per_node, options.network_gb_per_second * 1e9)
    found = report(case, cluster, options)
    print(wrapped("\n".join([*notes, *_lines(case, cluster, options, found)])))
    if options.json is not None:
        replace_file(options.json, json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(usage="%(prog)s --preflight [flags]", description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("--preflight", action="store_true", help="what this is")
    add("--gpus", type=whole(1, 10**6), default=8, metavar="COUNT", help="GPUs of the run (default: %(default)s)")
    add("--device", default="H100", metavar="NAME", help=f"one of {', '.join(DEVICES)} (default: %(default)s)")
    add("--gpus-per-node", type=whole(1, 1024), default=8, metavar="COUNT", help="of a node (default: %(default)s)")
    add("--network-gb-per-second", type=real(0, 10**4), default=50.0, metavar="GB",
        help="of one GPU to other nodes, one way (default: %(default)s)")  # fmt: skip
    add("--save-gb-per-second", type=real(0, 10**5), default=2.0, metavar="GB",
        help="that the file system writes in all (default: %(default)s)")  # fmt: skip
    add("--mfu", type=real(0, 1), default=0.4, metavar="FRACTION", help="share of the peak (default: %(default)s)")
    add("--dollars", type=real(0, 10**6), default=None, metavar="DOLLARS", help="price of one GPU for one hour")
    add("--suggest", nargs="?", type=whole(1, 100), const=5, default=0, metavar="COUNT",
        help="also the layouts that fit, the fastest on paper first (5 of them)")  # fmt: skip
    add("--json", type=Path, default=None, metavar="FILE", help="also write the figures here")
    return parser


def report(case: Case, cluster: Cluster, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure, in bytes, seconds, hours and dollars."""
    from megatron.scaling.planner import device_hours
    from megatron.training.layouts import flags_of, remedies, suggestion, suggestions
    from megatron.training.preflight import checkpoint_bytes, footprints, host_bytes, num_parameters, open_files

    capacity = cluster.device.memory_mib * 2**20
    moments = footprints(case)
    fullest = moments[0]
    of_stage = [each for each in moments if each.stage == fullest.stage]
    fits = fullest.total <= capacity
    flops = None if case.tokens is None else case.flops_per_token * case.tokens
    device_h, wall_h = device_hours(flops or 0, peak_flops=cluster.device.peak, mfu=options.mfu, devices=options.gpus)
    paper = suggestion(case, cluster)
    others = suggestions(case, cluster)[: options.suggest or 3] if options.suggest or not fits else []
    return {
        "parameters": num_parameters(case),
        "layout": {**case.layout.sizes(), "global_batch_size": case.layout.global_batch_size},
        "device_bytes": capacity,
        "fits": fits,
        "fullest": {"bytes": fullest.total, "moment": fullest.moment, "stage": fullest.stage, "parts": fullest.parts},
        "moments": {each.moment: each.total for each in of_stage},
        "remedies": {} if fits else {name: footprints(other)[0].total for name, other in remedies(case)},
        "suggestions": [_figures(each, flags_of(each.case)) for each in others],
        "host_bytes_a_node": host_bytes(case, cluster.gpus_per_node),
        "checkpoint_bytes": checkpoint_bytes(case),
        "checkpoint_seconds": checkpoint_bytes(case) / options.save_gb_per_second / 1e9,
        "open_files": open_files(case),
        "tokens": case.tokens,
        "flops_per_token": case.flops_per_token,
        "flops": flops,
        "device_hours": None if flops is None else device_h,
        "hours": None if flops is None else wall_h,
        "dollars": None if flops is None or options.dollars is None else device_h * options.dollars,
        "on_paper": _figures(paper, flags_of(case)),
        "assumed": list(case.notes),
    }


def _figures(each: Suggestion, flags: str) -> dict[str, Any]:
    return {"flags": flags, "bytes": each.bytes, "step_seconds": each.seconds, "mfu": each.mfu}


def _lines(case: Case, cluster: Cluster, options: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    layout, device = case.layout, named(options.device, DEVICES)
    name = case.config.model.model or f"{found['parameters'] / 1e6:.4g}M parameters"
    yield (
        f"{name}, {case.config.objective.objective}, {'bf16' if case.width == 2 else 'fp32'} on {layout.world_size} x {device}: "
        f"tp {layout.tp_size} x pp {layout.pp_size} x dp {layout.dp_size}, {layout.sharding}; global batch "
        f"{layout.global_batch_size} = micro {layout.micro_batch_size} x dp {layout.dp_size} x {layout.num_micro_batches}"
    )
    yield ""
    yield from _memory_lines(case, found)
    yield ""
    yield from _cost_lines(case, options, found)
    yield from _machine_lines(case, options, found)
    yield from (f"note: {line}" for line in found["assumed"])


def _memory_lines(case: Case, found: dict[str, Any]) -> Iterator[str]:
    used, capacity = found["fullest"]["bytes"], found["device_bytes"]
    spare = capacity - used
    verdict = "Fits" if spare >= 0 else "Does not fit"
    tight = ", tightly" if 0 <= spare < 0.05 * capacity else ""
    rest = f"{spare / GIB:.1f} free" if spare >= 0 else f"{-spare / GIB:.1f} too much"
    stage = f", stage {found['fullest']['stage']}" if case.layout.pp_size > 1 else ""
    yield f"{verdict}{tight}: {used / GIB:.1f} of {capacity / GIB:.1f} GiB, {rest} ({found['fullest']['moment']}{stage})."
    for part, size in found["fullest"]["parts"].items():
        assumed = "  (CUDA, NCCL, allocator: assumed)" if part == "runtime" else ""
        yield f"  {part:<12} {size / GIB:6.1f} GiB{assumed}"
    yield "  at other moments: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in found["moments"].items())
    if found["remedies"]:
        yield "What one flag makes of it:"
    width = max(map(len, found["remedies"]), default=0)
    for flag, size in sorted(found["remedies"].items(), key=lambda item: item[1]):
        verdict = "fits" if size <= capacity else "does not fit"
        yield f"  {flag:<{width}} {size / GIB:6.1f} GiB  {verdict}"
    if found["suggestions"]:
        yield "Layouts that fit, the fastest on paper first (GiB a GPU, seconds a step, MFU; none was measured):"
    for each in found["suggestions"]:
        yield f"  {each['bytes'] / GIB:5.1f}  {each['step_seconds']:7.3g} s  {each['mfu']:4.0%}  {each['flags']}"
    if not found["suggestions"] and min((used, *found["remedies"].values())) > capacity:
        yield "No layout of this run fits on these GPUs: more of them, or larger ones, or a smaller model."


def _cost_lines(case: Case, options: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    paper = found["on_paper"]
    yield f"Step: {paper['step_seconds']:.3g} s and {paper['mfu']:.0%} MFU on paper, which ranks layouts and promises nothing."
    if found["flops"] is None:
        return
    money = "" if found["dollars"] is None else f", ${found['dollars']:,.0f}"
    yield (
        f"Training: {found['tokens']:.4g} tokens, {found['flops']:.3g} FLOPs (attention counted, recomputation not); at "
        f"{options.mfu:.0%} MFU {found['hours']:.3g} h, {found['device_hours']:,.4g} GPU hours{money}."
    )


def _machine_lines(case: Case, options: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    host = found["host_bytes_a_node"]
    peak = host["processes"] + host["optimizer"] + max(host["building"], host["saving"])
    yield (
        f"Host memory a node: {peak / 1e9:.0f} GB (processes and loaders {host['processes'] / 1e9:.0f}, assumed; "
        f"building {host['building'] / 1e9:.0f}; saving {host['saving'] / 1e9:.0f}; optimizer {host['optimizer'] / 1e9:.0f})."
    )
    yield (
        f"Checkpoint: {found['checkpoint_bytes'] / 1e9:.1f} GB in {case.layout.world_size} files, "
        f"{format_seconds(found['checkpoint_seconds'])} at {options.save_gb_per_second:g} GB/s."
    )
    here, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], found["open_files"]
    verdict = "enough" if needed <= here else f"fix: ulimit -n {2 * needed}"
    yield f"Open files: {needed} on rank 0 at most (estimated); ulimit -n is {here} here: {verdict}."
    why = "the default on a GPU" if case.config.parallel.compile is None else "by the flag"
    if case.is_compiled and case.layout.tp_size > 1 and not case.is_split and case.shape.attention_dropout:
        yield (
            f"Compile: on ({why}), each block in pieces: attention dropout of tensor-parallel ranks that do not share the "
            "sequence breaks its graph; --attention-dropout 0, or sequence parallelism, keeps it whole."
        )
    elif case.is_compiled:
        yield f"Compile: on ({why}): every block is one graph, compiled once for all {case.shape.num_layers}, in the first step."
    else:
        why = "the default under ZeRO 3, whose hooks break graphs" if case.config.parallel.compile is None else why
        yield f"Compile: off ({why}): each block also keeps the activation of its gate."
