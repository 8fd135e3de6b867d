"""Measure likelihood estimators on a trained masked diffusion model: cost, error, agreement of rankings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle, whole
from megatron.errors import UserError, require
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
    parser = Parser(
        description=(__doc__ or "").splitlines()[0],
        examples=("megatron compare-estimators --load runs/mdm --text validation.jsonl",),
    )
    parser.add_argument("--load", required=True, metavar="RUN", help="run directory, export, or RUN+RUN")
    parser.add_argument("--load-tag", metavar="TAG", help="checkpoint of it; default: the newest that verifies")
    add_load_kind(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", metavar="FILE", help='JSONL of {"text"} that the model was not trained on')
    data.add_argument(
        "--valid-data-path",
        metavar="PREFIX",
        help="instead: validate on this set with many noise seeds",
    )
    parser.add_argument("--num-mc", type=COUNT, default=2, metavar="DRAWS", help="of a validation (default: 2)")
    parser.add_argument(
        "--parts",
        type=COUNT,
        metavar="N",
        help="only print the spread of the loss in N equal parts of the masked share",
    )
    parser.add_argument(
        "--questions", type=COUNT, default=100, metavar="COUNT", help="cut from the texts of --text (default: 100)"
    )
    parser.add_argument(
        "--answer-tokens",
        default="4,6,8,10",
        metavar="N,N,...",
        help="lengths of their answers, at most 12, because all masks are run once (default: 4,6,8,10)",
    )
    parser.add_argument(
        "--repeats", type=COUNT, default=20, metavar="SEEDS", help="noise seeds of every estimator (default: 20)"
    )
    parser.add_argument(
        "--variance-tokens", type=COUNT, metavar="N", help="only print variances for answers of N tokens, N passes"
    )
    parser.add_argument("--batch-size", type=COUNT, default=128, metavar="ROWS", help="rows in a pass (default: 128)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    require(
        arguments.text is None or arguments.parts is None,
        "--parts with --text",
        "a spread is that of samples",
        "pass --valid-data-path",
    )
    if arguments.text is None:
        idle = dict.fromkeys(("questions", "answer_tokens", "variance_tokens"), "a validation asks no questions")
        idle |= {"repeats": "a spread is of one seed"} if arguments.parts is not None else {}
    else:
        idle = {"num_mc": "it is of a validation"}
        idle |= {"answer_tokens": "--variance-tokens says it"} if arguments.variance_tokens is not None else {}
    refuse_idle(parser, arguments, idle)
    return arguments


def validations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what the noise of a validation costs, by estimator; returns the figures."""
    from megatron.config.schema import BERNOULLI, EXACT_COUNT
    from megatron.data.dataset import build_dataset
    from megatron.evaluation.validation_noise import repeat_validation, spread_by_share
    from megatron.inference.model import load_model
    from megatron.randomness import VALIDATION_SEED
    from megatron.statistics import mean_loss

    require(arguments.repeats > 1, "--repeats 1", "a variance needs two seeds", "repeat more often")
    loaded = load_model(arguments.load, tag=arguments.load_tag, kind=arguments.load_kind).decoded("masked")
    dataset = build_dataset(
        [arguments.valid_data_path], num_samples=None, seq_length=loaded.max_length, seed=VALIDATION_SEED, name="valid"
    )
    if arguments.parts is not None:
        sizes = {"parts": arguments.parts, "num_mc": arguments.num_mc, "batch_size": arguments.batch_size}
        spread = spread_by_share(loaded, dataset, **sizes)
        print(f"spread of a draw, nats per token, in {arguments.parts} parts of the masked share; "
              f"{dataset.num_samples} samples, {arguments.num_mc} draws of each")  # fmt: skip
        print(f"--noise-schedule measured --noise-schedule-spread {','.join(f'{value:.3g}' for value in spread)}")
        return {"spread": spread.tolist()}
    print(
        f"{'estimator':<24} {'sd of a sample':>14} {'sd of the whole':>16} {'printed ±':>10}  ±1.96 and ±t hold the mean"
    )
    found = {}
    for name in (BERNOULLI, EXACT_COUNT):
        options = {"num_mc": arguments.num_mc, "repeats": arguments.repeats, "batch_size": arguments.batch_size}
        repeated = repeat_validation(loaded, dataset, estimator=name, **options)
        found[name] = repeated.variances()
        errors = [mean_loss(sums).error for sums in repeated.sums]
        held = repeated.coverage(1000)
        one, whole = (value**0.5 for value in found[name])
        print(
            f"{name:<24} {one:14.4f} {whole:16.4f} {sum(errors) / len(errors):10.4f}  {held[0]:.3f} {held[1]:.3f}",
            flush=True,
        )
    one, whole = (old / new for old, new in zip(found[BERNOULLI], found[EXACT_COUNT]))
    first = repeated.sums[0]
    print(f"variance of {BERNOULLI} by that of {EXACT_COUNT} at {arguments.num_mc} passes: {one:.1f} of a sample, {whole:.1f} of "
          f"the whole; {first.num_samples} samples, {first.num_documents} documents, {arguments.repeats} seeds; "
          "1,000 resamplings of documents and noise")  # fmt: skip
    return {"variances": {name: {"of_a_sample": one, "of_the_whole": whole} for name, (one, whole) in found.items()}}


def main() -> None:
    """Parse, measure, print, write."""
    arguments = _arguments()
    found = answers(arguments) if arguments.valid_data_path is None else validations(arguments)
    if arguments.output:
        replace_file(arguments.output, json.dumps(found, indent=1))


def answers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what estimators cost on answers to questions made of texts; returns the figures."""
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

    loaded = load_model(arguments.load, tag=arguments.load_tag, kind=arguments.load_kind).decoded("masked")
    loaded.require_whole_sequences()
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
        return {"variances": {name: float(value) for name, value in found.items()}}
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
    return {"accuracy_of_the_bound": right, "rows": rows}
