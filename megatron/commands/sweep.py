"""A sweep is one YAML file (docs/scaling.md): list it, price it, run it here or on SLURM, show where it stands."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.errors import require

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.scaling.sweep.definition import Sweep, SweepRun


EXAMPLES = (
    "megatron sweep examples_scaling/sweeps/laptop.yaml list",
    "megatron sweep examples_scaling/sweeps/laptop.yaml run --jobs 2",
)


def main(arguments: list[str] | None = None) -> int:
    """Do what the action says; returns the exit status."""
    options = _parser().parse_args(arguments)
    from megatron.scaling.sweep.definition import load_sweep

    sweep = load_sweep(options.sweep)
    actions = {"list": _list, "price": _price, "status": _status, "check": _check, "run": _run, "slurm": _slurm}
    return actions[options.action](sweep, _selected(sweep, options.only), options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="FILE", help="the sweep's YAML file")
    add("action", metavar="ACTION", choices=["list", "price", "status", "check", "run", "slurm"],
        help="list: runs and their commands; price: FLOPs and hours; status: where every run stands; check: what differs "
             "within comparisons; run: everything that is not finished; slurm: write an array job")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="these runs, or all whose name contains the text (default: all)")
    add("--jobs", type=whole(1, 4096), default=1, metavar="COUNT", help="run: at the same time (default: 1)")
    add(
        "--devices-per-job",
        type=whole(0, 4096),
        default=0,
        metavar="COUNT",
        help="run: GPUs each job sees (default: 0, all)",
    )
    add(
        "--attempts",
        type=whole(1, 10**6),
        default=2,
        metavar="COUNT",
        help="run: starts before a run counts as failed (default: 2)",
    )
    add("--output", type=Path, metavar="DIR", help="slurm: folder of the job script (default: OUTPUT/slurm)")
    return parser


def _selected(sweep: Sweep, only: list[str] | None) -> list[SweepRun]:
    if not only:
        return list(sweep.runs)
    names = {run.name for run in sweep.runs}
    found = [
        run for run in sweep.runs if any(text == run.name or (text not in names and text in run.name) for text in only)
    ]
    require(found, f"--only {' '.join(only)}", "no run has such a name", "see the names with: list")
    return found


def _list(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.runner import command_line

    for run in runs:
        print(f"{run.name}\n    {shlex.join(command_line(sweep, run))}")
    print(f"{len(runs)} runs")
    return 0


def _price(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.runs.counts import format_count
    from megatron.scaling.sweep.definition import dollars, hours

    for run in [*runs, None]:
        flops = run.flops if run else sum(other.flops for other in runs)
        name = run.name if run else f"{len(runs)} runs together"
        needed = hours(flops, sweep.price)
        size = f"{format_count(run.parameters)} parameters, " if run else ""
        time = "" if needed is None else f", {needed:.3g} h"
        cost = dollars(flops, sweep.price)
        money = "" if cost is None else f", ${cost:,.2f}"
        print(f"{name}: {size}{flops:.3g} FLOPs{time}{money}")
    if sweep.price:
        device = (
            f"{sweep.price['peak_tflops']} TFLOP/s"
            if "peak_tflops" in sweep.price
            else sweep.price.get("device", "H100")
        )
        money = f"${sweep.price['dollars']} an hour and device, " if "dollars" in sweep.price else ""
        print(f"hours on {sweep.price.get('devices', 1)} x {device} at {float(sweep.price.get('mfu', 0.4)):.0%} MFU, {money}"
              "training only, one run after another: estimated, not measured")  # fmt: skip
    else:
        print("no hours: the sweep names no price (device, devices, mfu)")
    return 0


def _status(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.runs.comparison import plus_minus
    from megatron.scaling.sweep.state import read_result, state

    counts: Counter[str] = Counter()
    for run in runs:
        current = state(run)
        counts[current] += 1
        result = read_result(run)
        done = f" {min(1.0, result.samples_done / max(1, int(result.info['train_samples']))):.0%}" if result else ""
        best = (
            f", best {plus_minus(result.best.nll, result.best.nll_se)} (± over {result.best.error_unit}) "
            f"{result.best.full_label}"
            if result and result.best
            else ""
        )
        print(f"{run.name}: {current}{done if current != 'finished' else ''}{best}")
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    return 0


def _check(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    """Exit status 1 where something besides the objective differs within a comparison."""
    from megatron.runs.matching import matched_pairs
    from megatron.scaling.sweep.definition import unmatched
    from megatron.scaling.sweep.state import read_result

    found = unmatched(runs)
    results = [result for run in runs if (result := read_result(run)) is not None]
    for first, second, differing in matched_pairs(results):
        same_place = first.name.split("-", 1)[1] == second.name.split("-", 1)[1]
        if same_place:
            found += [
                f"{first.name} and {second.name}, as run: {item}" for item in differing if item.weight != "layout"
            ]
    print("\n".join(found) if found else "matched: within every comparison only the objective differs")
    return 1 if found else 0


def _run(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.runner import Runner

    runner = Runner(
        sweep, jobs=options.jobs, devices_per_job=options.devices_per_job, attempts=options.attempts,
        say=lambda text: print(text + "\n", end="", flush=True),  # one write: the jobs speak from threads
    )  # fmt: skip
    results = runner.run(runs)
    counts = Counter(results.values())
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    for name in [name for name, outcome in results.items() if outcome == "failed"]:
        print(f"failed: {name}", file=sys.stderr)
    return 130 if counts["stopped"] else 1 if counts["failed"] else 0


def _slurm(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.slurm import write_slurm

    script = write_slurm(sweep, runs, options.output or sweep.output / "slurm")
    print(f"sbatch {script}")
    return 0
