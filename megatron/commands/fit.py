"""Fit scaling laws to run directories: parameters with 95 % intervals, held-out errors, and a file for tools/plan.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.commands.compare import name_unread
from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.errors import require
from megatron.screen import wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.scaling.fit import Fit
    from megatron.scaling.observations import Observations

LAW_NAMES = ("chinchilla", "data_constrained", "prescriptive", "u_shaped", "memorisation")
PUBLISHED = ("hoffmann", "besiroglu", "muennighoff", "kim", "quokka", "gidd_masked", "gidd_low_uniform", "gidd_balanced",
             "gidd_high_uniform", "gidd_uniform")  # fmt: skip
POINTS = ("final", "best", "curve")


def main(arguments: list[str] | None = None) -> None:
    """Fit and print."""
    parser = Parser(description=__doc__, examples=("megatron fit runs/sweep --output fits.json",))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--law", choices=[*LAW_NAMES, "best"], default="best",
                        help="law to fit; best: the one with the lowest cross-validation error, of equal ones "
                             "that with the fewest open parameters (default)")  # fmt: skip
    parser.add_argument("--points", choices=POINTS, default="final",
                        help="validations to fit, of the weights as trained: last or best of every run, or whole curves "
                             "(default: final)")  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=whole(2, 10**6), default=400, metavar="REFITS", help="refits (default: 400)"
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="seed of starts and bootstrap (default: 0)")
    parser.add_argument("--published", choices=PUBLISHED, nargs="+", default=[], metavar="NAME",
                        help=f"also say how well published laws describe these runs: {', '.join(PUBLISHED)}")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the fits as JSON for tools/plan.py")
    options = parser.parse_args(arguments)
    _fit_all(options)


def _fit_all(options: argparse.Namespace) -> None:
    from megatron.runs.reading import find_runs
    from megatron.scaling.fit import save_fits
    from megatron.scaling.observations import observe

    left_out: list[str] = []
    runs = find_runs(options.runs, left_out=left_out)
    name_unread([*left_out, *(problem for run in runs for problem in run.problems)])
    fits = [_fit_one(data, options) for data in observe(runs, options.points)]
    require(fits, "no run with a likelihood was given", "a law is fitted to validation losses", "name finished runs")
    if options.output:
        save_fits(fits, options.output)
        _print(f"fits: {options.output}")


def _fit_one(data: Observations, options: argparse.Namespace) -> Fit:
    """Fit one law, or all that have enough points and keep the best; print what came out."""
    from megatron.scaling.laws import LAWS
    from megatron.scaling.observations import best_fit, fit_observations

    names = list(LAWS) if options.law == "best" else [options.law]
    if options.law == "best":
        names = [name for name in names if len(data.losses) >= len(LAWS[name].names) + 2] or names[:1]
    fits = [fit_observations(LAWS[name], data, num_bootstrap=options.bootstrap, seed=options.seed) for name in names]
    best = best_fit(fits, data)
    whose = f" imported from {data.source}" if data.source else ""
    _print(f"{data.objective.upper()}, {data.label}: {best.num_points} losses of {best.num_runs} runs{whose}")
    for text in data.skipped:
        _print(f"  left out: {text}")
    for fit in fits:
        undetermined = f", {len(fit.undetermined)} of {len(fit.law.names)} parameters open" * bool(fit.undetermined)
        chosen = " <- chosen" if fit is best and len(fits) > 1 else ""
        _print(f"  {fit.law.name}: R² {fit.r_squared:.4f}, residual {fit.noise:.2%}, "
              f"left-out runs {_percent(fit.cross_validation)}, "
              f"largest left-out runs {_percent(fit.extrapolation)}{undetermined}{chosen}")  # fmt: skip
    _print(f"  {best.law.equation}")
    for name in best.law.names:
        _print(f"    {name:6} {best.interval(name)}")
    for text in best.doubts:
        _print(f"  WARNING: do not trust {'even the best' if len(fits) > 1 else 'this'} law here: {text}")
    if best.undetermined:
        _print(f"  these runs leave {', '.join(best.undetermined)} open: use this law inside of their range only")
    spans = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in best.ranges.items())
    _print(f"  fitted on {spans}")
    for name in options.published:
        _print(_of_published(name, data))
    return best


def _of_published(name: str, data: Observations) -> str:
    """How well a published law describes the losses, in words."""
    import numpy as np

    from megatron.scaling.adequacy import r_squared
    from megatron.scaling.literature import LITERATURE

    law, points = LITERATURE[name], data.points
    predicted = law.loss(points.parameters, points.tokens, points.unique_tokens)
    error = np.log(predicted / data.losses)
    return (
        f"  published {name}: R² {r_squared(predicted, data.losses):.4f}, error {np.sqrt(np.mean(error**2)):.2%}, of that "
        f"in common {np.mean(error):+.2%} ({law.source})"
    )


def _print(text: str) -> None:
    print(wrapped(text))


def _percent(value: float | None) -> str:
    return "too few runs" if value is None else f"{value:.2%}"
