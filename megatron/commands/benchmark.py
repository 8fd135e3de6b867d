"""Measure training speed: tokens/s, TFLOP/s, MFU, step time and peak memory, as JSON.

Takes every flag of megatron train, and names those that a benchmark does not heed; tokens are random, the engine,
optimizer and data loader are the real ones.
With --compare-plain, each step alternates with a step of the same model in plain PyTorch that computes the logits and
the softmax of every position, as the usual implementation does; on a shared machine only that ratio means anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.errors import require
from megatron.files import replace_file
from megatron.screen import wrapped

EXAMPLES = (
    "megatron benchmark --objective mdm --model 425M --micro-batch-size 8 --bf16",
    "torchrun --nproc-per-node 8 tools/benchmark.py --model 2298M --bf16 --tensor-model-parallel-size 2",
)


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print JSON on the first rank."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    parser.add_argument("--steps", type=whole(1, 10**6), default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=whole(0, 10**6), default=3, help="steps before them (default: 3)")
    parser.add_argument("--compare-plain", action="store_true", help="alternate with plain PyTorch steps (one process)")
    parser.add_argument(
        "--trace",
        type=Path,
        default=None,
        metavar="FILE",
        help="record two further steps here (.json or .json.gz, for chrome://tracing), and name their largest costs",
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    options, flags = parser.parse_known_args(argv)
    from megatron.commands.speed import benchmark_config, measure
    from megatron.parallel.launch import Launch

    notes: list[str] = []
    config, launch = benchmark_config(flags, options.warmup + options.steps, notes), Launch.from_environment()
    if notes and launch.is_first_rank:
        print(wrapped("\n".join(notes)), file=sys.stderr)
    require(
        not options.compare_plain
        or (launch.world_size == 1 and config.run.global_batch_size == config.run.micro_batch_size),
        "--compare-plain with accumulation or several ranks",
        "the plain step is one process and one micro-batch",
        "start one process, and make --global-batch-size equal to --micro-batch-size",
    )
    counts = {"steps": options.steps, "warmup": options.warmup}
    trace = options.trace
    require(
        trace is None or trace.parent.is_dir(),
        f"--trace {trace}",
        "its folder must be there",
        "make it, or name another",
    )
    result = measure(config, **counts, compare_plain=options.compare_plain, trace=trace)
    if launch.is_first_rank:
        text = json.dumps(result, indent=1)
        print(text)
        if options.json is not None:
            replace_file(options.json, text + "\n")
