"""Average the weights of checkpoints: the last ones of a run, or any set of one architecture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.config.schema import WEIGHT
from megatron.errors import require


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__,
        examples=(
            "megatron average runs/ar --last 5 --output runs/ar-mean",
            "megatron average runs/a/global_step40 runs/b --output runs/mean",
            "megatron average runs/seed1 runs/seed2 --load-tag best --output runs/soup",
        ),
        epilog="The mean is a run directory with one checkpoint of weights alone: evaluate, generate from or convert it as "
        "any other, or start from it with --finetune. Its manifest says what it is the mean of.",
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="RUN", help="run directory, or one tag of it; of any layouts")
    add("--output", required=True, type=Path, metavar="DIR", help="run directory to make")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--last", type=whole(1, 10**6), metavar="COUNT", help="the last so many checkpoints of every run"
    )
    which.add_argument("--load-tag", metavar="TAG", help="checkpoint of every run, such as best; default: the newest")
    add_load_kind(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Average, write, and print what was averaged."""
    args = parse_args(argv)
    from megatron.checkpoint.averaging import last_checkpoints, mean_of
    from megatron.checkpoint.files import AVERAGED_FROM
    from megatron.convert.run_folder import write_run

    tags = [tag for source in args.sources for tag in last_checkpoints(source, count=args.last, tag=args.load_tag)]
    require(
        len(tags) > 1, f"{tags[0]} alone", "a mean is of several checkpoints", "pass --last COUNT, or name more of them"
    )
    config, tensors, more = mean_of(tags, args.load_kind or WEIGHT)
    step = more[AVERAGED_FROM][-1]["step"]
    write_run(args.output, config, tensors, step=step, source=", ".join(map(str, tags)), more=more)
    report = {
        "output": str(args.output),
        "step": step,
        "tensors": len(tensors),
        AVERAGED_FROM: [str(tag) for tag in tags],
    }
    print(json.dumps(report, indent=1))
