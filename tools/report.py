#!/usr/bin/env python3
"""Turn run directories into a report: one HTML page that needs no other file, and its figures as PNG and SVG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools._run import run as run_tool


def main(arguments: list[str] | None = None) -> None:
    """Write the report and print what it concludes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or folder holding run directories"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("--fits", type=Path, metavar="FILE", help="laws of tools/fit_laws.py, for their figures")
    parser.add_argument("--title", default="AR and masked diffusion compared", help="heading of the page")
    options = parser.parse_args(arguments)
    _report(options)


def _report(options: argparse.Namespace) -> None:
    # After the flags are read, so that --help does not wait for matplotlib.
    from megatron.runs.comparison import summary_row
    from megatron.runs.conclusion import conclusion
    from megatron.runs.matching import matched_pairs
    from megatron.runs.reading import find_runs
    from megatron.runs.replicates import average_seeds
    from megatron.scaling.fit import load_fits
    from megatron.scaling.report.page import write_report

    runs = find_runs(options.runs)
    fits = load_fits(options.fits) if options.fits else []
    page = write_report(runs, options.output, options.title, fits=fits)
    for problem in [problem for run in runs for problem in run.problems]:
        print(f"not read: {problem}", file=sys.stderr)
    for run in runs[:12]:
        row = summary_row(run)
        print(f"{row['Run']}: {row['Best validation, nats/token']} nats/token (± over {row['± over']}), {row['Kind']}; "
              f"overfits: {row['Overfits']}")  # fmt: skip
    for first, second, found in matched_pairs(runs)[:12]:
        real = [str(item) for item in found if item.weight == "result"]
        unknown = [str(item) for item in found if item.weight == "unknown"]
        verdict = "matched" if not real else "differs in " + "; ".join(real)
        print(f"pair {first.name} / {second.name}: " + "; ".join([verdict, *unknown]))
    print("\n".join(["", *conclusion(average_seeds(runs)), "", f"report: {page}"]))


if __name__ == "__main__":
    run_tool(main)
