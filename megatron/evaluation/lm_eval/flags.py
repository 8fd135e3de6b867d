"""Flags of a downstream evaluation; they import no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib

from megatron.config import build_parser
from megatron.config.ranges import whole
from megatron.evaluation.names import ESTIMATORS, PAPER_TASKS
from megatron.generation.flags import POLICIES
from megatron.objectives import OBJECTIVES

EXAMPLES = (
    "megatron eval --load runs/mdm --task_list arc_easy,hellaswag --num-mc 32",
    "megatron eval --load runs/ar --task_list questions.jsonl",
)


def build_downstream_parser() -> argparse.ArgumentParser:
    """Evaluation flags in front of all training flags (which scripts pass along); absent ones are absent."""
    parser = build_parser(OBJECTIVES, examples=EXAMPLES)
    parser.description = "Evaluate a checkpoint of any layout, or a Hugging Face export, on lm-eval and local tasks."
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    group = parser.add_argument_group("downstream evaluation (see docs/evaluation.md)")
    add = group.add_argument
    add("--task_list", default="all", metavar="TASKS", help=f"comma-separated: {', '.join(PAPER_TASKS)}, tasks of lm-eval, "
        "FILE.jsonl; 'all' is the nine named (default: all)")  # fmt: skip
    add("--results_path", metavar="FILE", help="write lm-eval's JSON here; finished answers go to FILE.cache/ and are not "
        "computed again")  # fmt: skip
    add("--eval_method", choices=("ar", "mc", "exact"), help="ar: chain rule from left to right; mc: Monte-Carlo bound "
        "(diffusion; default there) of up to --num-mc draws (default: 128); exact: likelihood under the sampler of "
        "--policy")  # fmt: skip
    add("--policy", choices=POLICIES, metavar="NAME", help="masked diffusion, --eval_method exact: what is uncovered "
        f"next: {', '.join(POLICIES)} (default: confidence)")  # fmt: skip
    add("--tokens_per_step", type=whole(1, 10**6), metavar="K", help="tokens that --policy uncovers in a pass "
        "(default: 1)")  # fmt: skip
    add("--estimator", choices=ESTIMATORS, metavar="NAME", help="masked diffusion: likelihood estimator instead of "
        f"--eval_method's: {', '.join(ESTIMATORS)}")  # fmt: skip
    add("--no_adaptive", action="store_true", help="always --num-mc draws, also where the ranking is decided")
    add(
        "--only_generate",
        action="store_true",
        help="masked diffusion: exact match by greedy decoding only, no likelihoods",
    )
    add("--only_mc_nll", action="store_true", help="diffusion: likelihoods only, no greedy decoding")
    add("--eval_fp32", action="store_true", help="run in float32 whatever --bf16 says (default on CPU)")
    add("--inference", action="store_true", help="accepted for existing scripts: this program never trains")
    add("--limit", type=_limit, metavar="N", help="items per task (a fraction below 1)")
    add("--num_fewshot", type=_shots, metavar="N", help="examples in the context; default: the task's own")
    add("--gen_kwargs", metavar="K=V,...", help="generation: temperature, top_k, top_p, max_gen_toks; masked diffusion also "
        "order, steps, block_length, guidance")  # fmt: skip
    add("--log_samples", action="store_true", help="put every item and its scores into the JSON")
    add("--fetch_only", action="store_true", help="fetch the data sets into the Hugging Face cache and exit")
    parser._action_groups.insert(2, parser._action_groups.pop())
    return parser


def _limit(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value < 1 or (1 <= value < 1e15 and value == int(value)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number of items; give 1 or more, or a fraction below 1")


def _shots(text: str) -> int:
    if text.isdecimal() and len(text) < 7:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of examples; give 0 or more")
