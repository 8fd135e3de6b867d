"""A sweep is one YAML file (docs/scaling.md): list it, price it, run it or search with it, here or on SLURM, show where
it stands."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle, whole
from megatron.errors import require
from megatron.screen import wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.scaling.sweep.definition import Sweep
    from megatron.scaling.sweep.runner import Runner
    from megatron.scaling.sweep.search import Search
    from megatron.scaling.sweep.space import Space
    from megatron.scaling.sweep.sweep_run import SweepRun


EXAMPLES = (
    "megatron sweep examples_scaling/sweeps/laptop.yaml list",
    "megatron sweep examples_scaling/sweeps/laptop.yaml run --jobs 2",
    "megatron sweep examples_scaling/sweeps/fair_laptop.yaml search --jobs 2",
)


def main(arguments: list[str] | None = None) -> int:
    """Do what the action says; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    idle = {} if options.action == "slurm" else {"output": f"{options.action} writes no job script"}
    if options.action not in ("run", "search"):
        idle |= dict.fromkeys(("jobs", "devices_per_job", "attempts"), f"{options.action} starts nothing")
    refuse_idle(parser, options, idle)
    from megatron.scaling.sweep.definition import load_sweep

    sweep = load_sweep(options.sweep)
    actions = {
        "list": _list,
        "price": _price,
        "status": _status,
        "check": _check,
        "run": _run,
        "search": _search,
        "slurm": _slurm,
    }
    return actions[options.action](sweep, _selected(sweep, options.only), options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="FILE", help="the sweep's YAML file")
    add("action", metavar="ACTION", choices=["list", "price", "status", "check", "run", "search", "slurm"],
        help="list: runs and their commands; price: FLOPs and hours; status: where every run stands; check: what differs "
             "within comparisons; run: everything that is not finished; search: tune from every run of the grid, with as "
             "many trials as the file says; slurm: write an array job")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="these runs, or all whose name contains the text (default: all)")
    add(
        "--jobs",
        type=whole(1, 4096),
        default=1,
        metavar="COUNT",
        help="run, search: at the same time (default: 1); the trials of one search follow each other",
    )
    add(
        "--devices-per-job",
        type=whole(0, 4096),
        default=0,
        metavar="COUNT",
        help="run, search: GPUs each job sees (default: 0, all)",
    )
    add(
        "--attempts",
        type=whole(1, 10**6),
        default=2,
        metavar="COUNT",
        help="run, search: starts before a run counts as failed (default: 2)",
    )
    add("--output", type=Path, metavar="DIR", help="slurm: folder of the job script (default: OUTPUT/slurm)")
    return parser


def _selected(sweep: Sweep, only: list[str] | None) -> list[SweepRun]:
    if not only:
        return list(sweep.runs)
    names = {run.name for run in sweep.runs}
    found = [run for run in sweep.runs if any(_is_meant(text, run, names) for text in only)]
    require(found, f"--only {' '.join(only)}", "no run has such a name", "see the names with: list")
    return found


def _is_meant(text: str, run: SweepRun, names: set[str]) -> bool:
    """Whether ``--only`` means a run: by its name, a part of it, or the name of the run that it is a branch of."""
    return text in (run.name, run.trunk and run.trunk.name) or (text not in names and text in run.name)


def _list(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.runner import command_line

    for run in runs:
        print(f"{run.name}\n    {shlex.join(command_line(sweep, run))}")
    print(f"{len(runs)} runs")
    return 0


def _price(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.runs.counts import format_count
    from megatron.scaling.sweep.definition import dollars, hours
    from megatron.scaling.sweep.price import price_of

    prices = [price_of(run, sweep.price) for run in runs]
    for run, each in zip(runs, prices):
        room = f", {each.bytes / 2**30:.3g} GiB a GPU" if sweep.price and "peak_tflops" not in sweep.price else ""
        size = f"{format_count(run.parameters)} parameters, {run.flops:.3g} FLOPs by 6ND"
        print(f"{run.name}: {size}, {each.flops:.3g} computed{_spent(each.hours, each.dollars)}{room}")
    total = sum(each.flops for each in prices)
    spent = _spent(hours(total, sweep.price), dollars(total, sweep.price))
    print(f"{len(runs)} runs together: {sum(run.flops for run in runs):.3g} FLOPs by 6ND, {total:.3g} computed{spent}")
    names = {run.name for run in runs}
    if spaces := [space for space in sweep.spaces if space.start.name in names]:
        print(_price_of_search(sweep, spaces, {run.name: each.flops for run, each in zip(runs, prices)}))
    if sweep.price:
        device = (
            f"{sweep.price['peak_tflops']} TFLOP/s"
            if "peak_tflops" in sweep.price
            else sweep.price.get("device", "H100")
        )
        money = f"${sweep.price['dollars']} an hour and device, " if "dollars" in sweep.price else ""
        print(f"hours on {sweep.price.get('devices', 1)} x {device} at {float(sweep.price.get('mfu', 0.4)):.0%} MFU, {money}"
              "of what is computed (attention counted, recomputation not), training only, one run after another; memory at most: "
              "all estimated, not measured")  # fmt: skip
    else:
        print("no hours: the sweep names no price (device, devices, mfu)")
    return 0


def _spent(hours: float | None, dollars: float | None) -> str:
    return ("" if hours is None else f", {hours:.3g} h") + ("" if dollars is None else f", ${dollars:,.2f}")


def _price_of_search(sweep: Sweep, spaces: list[Space], computed: dict[str, float]) -> str:
    """What searches take at most, by what their starts compute."""
    from megatron.scaling.sweep.definition import dollars, hours

    flops, trials = sum(space.most_flops for space in spaces), sum(space.trials for space in spaces)
    total = sum(computed[space.start.name] * space.most_flops / space.start.flops for space in spaces)
    spent = _spent(hours(total, sweep.price), dollars(total, sweep.price))
    return f"search, {trials} trials from these runs: at most {flops:.3g} FLOPs by 6ND, {total:.3g} computed{spent}"


def _status(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.commands.compare import name_unread
    from megatron.runs.comparison import plus_minus
    from megatron.runs.reading import readable
    from megatron.scaling.sweep.state import read_result, state

    counts: Counter[str] = Counter()
    left_out: list[str] = []
    for run, current, result in readable(lambda run: (run, state(run), read_result(run)), runs, left_out):
        counts[current] += 1
        done = f" {min(1.0, result.samples_done / max(1, int(result.info['train_samples']))):.0%}" if result else ""
        best = (
            f", best {plus_minus(result.best.nll, result.best.nll_se)} (± over {result.best.error_unit}) "
            f"{result.best.full_label}"
            if result and result.best
            else ""
        )
        print(f"{run.name}: {current}{done if current != 'finished' else ''}{best}")
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    searches = _searches(sweep, runs)
    readable(lambda search: search.catch_up(), searches, left_out)
    name_unread(dict.fromkeys(left_out))
    if any(search.trials for search in searches):
        print(wrapped("\n".join(_verdict(searches))))
    return 0


def _check(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    """Exit status 1 where something besides the objective differs within a comparison."""
    from megatron.commands.compare import name_unread
    from megatron.runs.matching import matched_pairs
    from megatron.runs.reading import readable
    from megatron.scaling.sweep.definition import unmatched
    from megatron.scaling.sweep.state import read_result

    found = unmatched(runs)
    left_out: list[str] = []
    results = [result for result in readable(read_result, runs, left_out) if result is not None]
    name_unread(left_out)
    for first, second, differing in matched_pairs(results):
        same_place = first.name.split("-", 1)[1] == second.name.split("-", 1)[1]
        if same_place:
            found += [
                f"{first.name} and {second.name}, as run: {item}" for item in differing if item.weight != "layout"
            ]
    print("\n".join(found) if found else "matched: within every comparison only the objective differs")
    return 1 if found else 0


def _run(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    results = _runner(sweep, options).run(runs)
    counts = Counter(results.values())
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    failed = [name for name, outcome in results.items() if outcome == "failed"]
    _name_failed(failed)
    return 130 if counts["stopped"] else 1 if failed else 0


def _search(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.runner import make_subsets
    from megatron.scaling.sweep.state import is_finished
    from megatron.scaling.sweep.verdict import write_result

    require(sweep.spaces, f"{sweep.path} has no search", "a search needs trials and coordinates", "see docs/scaling.md")
    every, names = _searches(sweep, list(sweep.runs)), {run.name for run in runs}
    searches = [search for search in every if search.space.start.name in names]
    make_subsets(sweep, runs, _say)
    results = _runner(sweep, options).follow([search.chain() for search in searches])
    for search in every:  # with --only the others too: budgets are equal or not among all of the file
        search.catch_up()
    print(wrapped("\n".join(_verdict(every))))
    print(f"written: {write_result(every, sweep.output)}")
    failed = [name for name, outcome in results.items() if outcome == "failed"]
    _name_failed(failed)
    whole = all(search.is_complete and all(map(is_finished, search.members)) for search in searches)
    return 1 if failed else 0 if whole else 130


def _searches(sweep: Sweep, runs: list[SweepRun]) -> list[Search]:
    """The searches that begin with these runs."""
    from megatron.scaling.sweep.search import Search

    names = {run.name for run in runs}
    chosen = [space for space in sweep.spaces if space.start.name in names]
    return [Search(space, gives_up=sweep.gives_up, say=_say) for space in chosen]


def _verdict(searches: list[Search]) -> list[str]:
    """Every search, the budgets, and the choices against each other."""
    from megatron.commands.compare import comparison
    from megatron.scaling.sweep.verdict import budgets, describe

    lines = [line for search in searches for line in ["", *describe(search)]] + ["", *budgets(searches)]
    chosen = [search.chosen.result for search in searches if search.chosen and search.chosen.result]
    return [*lines, "", "The choices against each other:", *comparison(chosen)] if len(chosen) > 1 else lines


def _runner(sweep: Sweep, options: argparse.Namespace) -> Runner:
    from megatron.scaling.sweep.runner import Runner

    return Runner(
        sweep, jobs=options.jobs, devices_per_job=options.devices_per_job, attempts=options.attempts, say=_say
    )


def _say(text: str) -> None:
    print(text + "\n", end="", flush=True)  # one write: the jobs speak from threads


def _name_failed(names: list[str]) -> None:
    for name in names:
        print(f"failed: {name}", file=sys.stderr)


def _slurm(sweep: Sweep, runs: list[SweepRun], options: argparse.Namespace) -> int:
    from megatron.scaling.sweep.slurm import write_slurm

    script = write_slurm(sweep, runs, options.output or sweep.output / "slurm")
    print(f"sbatch {script}")
    return 0
