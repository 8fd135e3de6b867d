"""Measure likelihood estimators on a trained masked diffusion model: cost, error, agreement of rankings.

python tools/compare_estimators.py --load RUN --text validation.jsonl --output figures.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron.config.ranges import whole
from megatron.errors import UserError
from megatron.files import replace_file

COUNT = whole(1, 10**9)


def answer_lengths(text: str) -> list[int]:
    """The numbers of ``--answer-tokens``."""
    words = text.split(",")
    if not all(word.isdecimal() and len(word) < 3 and 1 <= int(word) <= 12 for word in words):
        raise UserError(
            f"--answer-tokens {text[:40]}", "all 2^n masks of an answer are run", "give numbers from 1 to 12"
        )
    return [int(word) for word in words]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", required=True, metavar="RUN")
    parser.add_argument("--load-tag", metavar="TAG")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help='JSONL of {"text"} that the model was not trained on'
    )
    parser.add_argument("--questions", type=COUNT, default=100, metavar="COUNT")
    parser.add_argument(
        "--answer-tokens", default="4,6,8,10", metavar="N,N,...", help="at most 12: all masks are run once"
    )
    parser.add_argument("--repeats", type=COUNT, default=20, metavar="SEEDS")
    parser.add_argument(
        "--variance-tokens", type=COUNT, metavar="N", help="only print variances for answers of N tokens, N passes"
    )
    parser.add_argument("--batch-size", type=COUNT, default=128, metavar="ROWS")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print, write."""
    arguments = _arguments()
    lengths = answer_lengths(arguments.answer_tokens)
    from megatron.evaluation.estimator_comparison import (
        TableScorer,
        compare,
        make_questions,
        read_texts,
        standard_methods,
        variances,
    )
    from megatron.evaluation.scorer import MaskedScorer
    from megatron.inference.model import load_model

    loaded = load_model(arguments.load, tag=arguments.load_tag)
    tokenizer = loaded.require_tokenizer()
    documents = [tokenizer.encode(text) for text in read_texts(Path(arguments.text))]
    if arguments.variance_tokens is not None:
        lengths = [arguments.variance_tokens]
    questions = make_questions(documents, number=arguments.questions, answer_tokens=lengths)
    scorer = MaskedScorer(
        loaded.logits, mask_id=loaded.mask_id, max_length=loaded.max_length, batch_size=arguments.batch_size,
        device=loaded.device,
    )  # fmt: skip
    if arguments.variance_tokens is not None:
        names = ("bernoulli-independent", "bernoulli", "exact-count", "exact-count-antithetic", "random-order")
        found = variances(scorer, questions, passes=lengths[0], repeats=arguments.repeats, names=names)
        for name, value in found.items():
            print(
                f"{name:<24} {value:10.4f} nats²  {value / found['bernoulli-independent']:7.3f} of independent-t Bernoulli"
            )
        print(
            f"variance of one estimate at {lengths[0]} passes over {arguments.repeats} seeds, mean of {len(questions)} answers"
        )
        return
    table = TableScorer(scorer, questions)
    right = sum(int(values.argmax()) == 0 for values in table.truth) / len(questions)
    print(f"{len(questions)} questions, {len(questions[0].choices)} answers of {arguments.answer_tokens} tokens, "
          f"{arguments.repeats} seeds; accuracy of the exact bound {right:.3f}")  # fmt: skip
    print(f"{'method':<58} {'passes':>7} {'agreement with the exact bound':>18} {'accuracy':>8} {'rms nats':>8}")
    rows = compare(
        table, questions, table.truth, methods=standard_methods(), repeats=arguments.repeats,
        report=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(
        "agreement ± standard error over seeds (the questions are fixed); rms nats: error of one likelihood, 0 for the bound"
    )
    if arguments.output:
        replace_file(arguments.output, json.dumps({"accuracy_of_the_bound": right, "rows": rows}, indent=1))
