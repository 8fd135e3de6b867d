#!/usr/bin/env python3
"""Fit scaling laws to run directories: parameters with 95 % intervals, held-out errors, and a file for tools/plan.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.runs.reading import find_runs
from megatron.scaling.fit import Fit, save_fits
from megatron.scaling.laws import LAWS
from megatron.scaling.observations import CHOICES, Observations, fit_observations, observe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--law", choices=[*LAWS, "best"], default="best",
                        help="law to fit; best: the one with the lowest cross-validation error (default)")  # fmt: skip
    parser.add_argument("--points", choices=CHOICES, default="final",
                        help="validations to fit: last or best of every run, or whole curves (default: final)")  # fmt: skip
    parser.add_argument("--bootstrap", type=int, default=400, metavar="REFITS", help="refits (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and bootstrap (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the fits as JSON for tools/plan.py")
    options = parser.parse_args(arguments)
    try:
        fits = [_fit_one(data, options) for data in observe(find_runs(options.runs), options.points)]
        if options.output:
            save_fits(fits, options.output)
            print(f"fits: {options.output}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _fit_one(data: Observations, options: argparse.Namespace) -> Fit:
    """Fit one law, or all that have enough points and keep the best; print what came out."""
    names = list(LAWS) if options.law == "best" else [options.law]
    if options.law == "best":
        names = [name for name in names if len(data.losses) >= len(LAWS[name].names) + 2] or names[:1]
    fits = [fit_observations(LAWS[name], data, num_bootstrap=options.bootstrap, seed=options.seed) for name in names]
    best = min(fits, key=lambda fit: fit.cross_validation if fit.cross_validation is not None else fit.noise)
    print(f"{data.objective.upper()}, {data.label}: {best.num_points} losses of {best.num_runs} runs")
    for text in data.skipped:
        print(f"  left out: {text}")
    for fit in fits:
        chosen = " <- chosen" if fit is best and len(fits) > 1 else ""
        print(f"  {fit.law.name}: residual {fit.noise:.2%}, left-out runs {_percent(fit.cross_validation)}, "
              f"largest left-out runs {_percent(fit.extrapolation)}{chosen}")  # fmt: skip
    print(f"  {best.law.equation}")
    for name in best.law.names:
        interval = best.interval(name)
        vague = "  (hardly determined by these runs)" if interval.high > 100 * interval.low else ""
        print(f"    {name:6} {interval}{vague}")
    spans = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in best.ranges.items())
    print(f"  fitted on {spans}")
    return best


def _percent(value: float | None) -> str:
    return "too few runs" if value is None else f"{value:.2%}"


if __name__ == "__main__":
    sys.exit(main())
