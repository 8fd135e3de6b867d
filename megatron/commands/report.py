"""Turn run directories into a report: one HTML page that needs no other file, and its figures as PNG and SVG."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.commands.compare import comparison
from megatron.config.parser import Parser
from megatron.screen import wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.runs.run import Run

EXAMPLES = (
    "megatron report runs/ar runs/mdm --output report",
    "megatron report runs --serve",
)


def main(arguments: list[str] | None = None) -> None:
    """Write the report and print what it concludes."""
    parser = Parser(
        description=__doc__,
        examples=EXAMPLES,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or folder holding run directories"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("--fits", type=Path, metavar="FILE", help="laws of tools/fit_laws.py, for their figures")
    parser.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="runs of a recipe on two or more amounts of data: how many times its own data would each run save it?",
    )
    parser.add_argument("--title", default="AR and masked diffusion compared", help="heading of the page")
    parser.add_argument(
        "--serve",
        nargs="?",
        type=_port,
        const=8000,
        metavar="PORT",
        help="after the runs: also serve the page on 127.0.0.1, made anew while runs train, until Ctrl-C (default: 8000; "
        "0: any free port)",
    )
    options = parser.parse_args(arguments)
    _report(options)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text} is no port (0 to 65535); name the runs before it: RUN --serve")
    return int(text)


def _report(options: argparse.Namespace) -> None:
    # After the flags are read, so that --help does not wait for matplotlib.
    from megatron.runs.reading import find_runs
    from megatron.scaling.fit import load_fits
    from megatron.scaling.multiplier import Baseline
    from megatron.scaling.report.page import write_report

    fits = load_fits(options.fits) if options.fits else []
    baseline = Baseline.of_runs(find_runs(options.baseline), "the baseline") if options.baseline else None

    def write() -> tuple[Path, list[Run], list[str]]:
        left_out: list[str] = []
        runs = find_runs(options.runs, left_out=left_out)
        page = write_report(runs, options.output, options.title, fits=fits, baseline=baseline, left_out=left_out)
        return page, runs, left_out

    page, runs, left_out = write()
    print(wrapped("\n".join([*comparison(runs, left_out), "", f"report: {page}"])), flush=True)
    if options.serve is not None:
        _serve(options, lambda: write()[0])


def _serve(options: argparse.Namespace, write: Callable[[], Path]) -> None:
    from megatron.scaling.report.serve import ADDRESS, LiveReport, open_server

    with open_server(LiveReport(options.runs, write), options.serve) as server:
        print(f"serving http://{ADDRESS}:{server.server_address[1]}/ on this machine only; Ctrl-C ends", flush=True)
        server.serve_forever()
