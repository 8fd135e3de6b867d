"""What each estimator costs and how well it ranks, measured on a trained masked diffusion model.

Questions are made from held-out text: 16 tokens of context, the L tokens that follow and L tokens from elsewhere. Short
answers are small enough to run every mask once, so the bound itself is known and any number of repetitions with other
seeds costs no further passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.jsonl import read_items
from megatron.errors import UserError, require
from megatron.evaluation.adaptive import Question, RaceSettings, race
from megatron.evaluation.estimators import EnumeratedBound, Estimator, make_estimator
from megatron.evaluation.scorer import MaskedScorer, Request, Tally

CONTEXT_TOKENS = 16


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file of ``{"text"}``.

    Raises:
        UserError: no file, or a line without a text.
    """
    items = read_items(path)
    for number, item in items:
        require(
            isinstance(item.get("text"), str), f"{path} line {number} has no text", 'lines are {"text"}', "correct it"
        )
    return [item["text"] for _, item in items]


def make_questions(
    documents: Sequence[Sequence[int]],
    *,
    number: int,
    answer_tokens: Sequence[int],
    num_choices: int = 3,
    seed: int = 0,
) -> list[Question]:
    """Questions whose first choice is right; answers of question i have ``answer_tokens[i % len]`` tokens."""
    rng = np.random.default_rng(seed)
    longest = CONTEXT_TOKENS + max(answer_tokens)
    usable = [document for document in documents if len(document) > longest]
    if not usable:
        raise UserError(
            f"no document has more than {longest} tokens", "questions are cut from long texts", "give other texts"
        )
    questions = []
    for index in range(number):
        length = answer_tokens[index % len(answer_tokens)]
        pieces = []
        for _ in range(num_choices):
            document = usable[rng.integers(len(usable))]
            start = int(rng.integers(len(document) - longest))
            pieces.append(document[start : start + CONTEXT_TOKENS + length])
        context = tuple(pieces[0][:CONTEXT_TOKENS])
        choices = [Request(context, tuple(piece[CONTEXT_TOKENS:]), f"question {index}") for piece in pieces]
        questions.append(Question(tuple(choices)))
    return questions


class TableScorer(MaskedScorer):
    """A scorer that looks passes up in the results of running all masks."""

    def __init__(self, scorer: MaskedScorer, questions: Sequence[Question]) -> None:
        self.__dict__.update(scorer.__dict__)
        choices = [choice for question in questions for choice in question.choices]
        tallies = [Tally(choice, EnumeratedBound()) for choice in choices]
        for start in range(0, len(tallies), scorer.chunk_size):
            scorer.extend(tallies[start : start + scorer.chunk_size], num_draws=1)
        self.table = {(t.request.context, t.request.target): t.token_logprobs for t in tallies}
        values = iter(float(t.values[0]) for t in tallies)
        self.truth = [np.array([next(values) for _ in question.choices]) for question in questions]

    def _forward(self, batch: list[tuple[Tally, np.ndarray, bytes]]) -> None:
        for tally, _, name in batch:
            tally.token_logprobs[name] = self.table[tally.request.context, tally.request.target][name]


@dataclass(frozen=True)
class Method:
    """One way to rank answers.

    Attributes:
        name: for the table.
        estimator: name of the estimator.
        draws: of every answer, or the most of them in a race.
        shared: common random numbers for the answers of a question.
        z: race with this threshold; None: no race.
    """

    name: str
    estimator: str
    draws: int
    shared: bool = True
    z: float | None = None


def rank(
    scorer: MaskedScorer, questions: Sequence[Question], method: Method, *, seed: int
) -> tuple[list[np.ndarray], float]:
    """Estimates of the answers of every question, and passes per answer. Repeated masks of plain draws are counted as
    often as they are drawn: only a race skips them."""
    estimator = make_estimator(method.estimator, seed=seed)
    if not method.shared:
        questions = [
            Question(tuple(Request(c.context, c.target, f"{c.key}/{i}") for i, c in enumerate(question.choices)))
            for question in questions
        ]
    if method.z is not None:
        settings = RaceSettings(first_draws=4, max_draws=method.draws, z=method.z)
        groups = race(scorer, questions, estimator, settings=settings)
        passes = [tally.num_passes for group in groups for tally in group]
    else:
        groups = [[Tally(choice, estimator) for choice in question.choices] for question in questions]
        scorer.extend([tally for group in groups for tally in group], num_draws=method.draws)
        passes = [len(tally.values) * _passes_per_draw(estimator, tally) for group in groups for tally in group]
    return [np.array([tally.values.mean() for tally in group]) for group in groups], float(np.mean(passes))


def _passes_per_draw(estimator: Estimator, tally: Tally) -> int:
    return estimator.draws(len(tally.request.target), key="", start=0, count=1).masks.shape[1]


def compare(
    scorer: MaskedScorer,
    questions: Sequence[Question],
    truth: Sequence[np.ndarray],
    *,
    methods: Sequence[Method],
    repeats: int,
    report: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Agreement of the best answer with ``truth``, root mean square error in nats and passes per answer of each method."""
    rows = []
    right = [int(values.argmax()) for values in truth]
    for method in methods:
        agreement, accuracy, squared, passes = [], [], [], []
        for seed in range(repeats):
            estimates, cost = rank(scorer, questions, method, seed=1000 + seed)
            best = [int(values.argmax()) for values in estimates]
            agreement.append(np.mean([a == b for a, b in zip(best, right)]))
            accuracy.append(np.mean([choice == 0 for choice in best]))
            squared.append(np.mean([np.square(a - b).mean() for a, b in zip(estimates, truth)]))
            passes.append(cost)
        row = {
            "method": method.name, "passes": float(np.mean(passes)), "agreement": float(np.mean(agreement)),
            "agreement_se": float(np.std(agreement, ddof=1) / np.sqrt(repeats)) if repeats > 1 else float("nan"),
            "accuracy": float(np.mean(accuracy)), "rms_error_nats": float(np.sqrt(np.mean(squared))),
        }  # fmt: skip
        rows.append(row)
        report(f"{row['method']:<58} {row['passes']:7.1f} {row['agreement']:9.4f} ± {row['agreement_se']:.4f} "
               f"{row['accuracy']:8.4f} {row['rms_error_nats']:8.3f}")  # fmt: skip
    return rows


def standard_methods() -> list[Method]:
    """The methods of the table in docs/evaluation.md."""
    plain = [Method(f"independent-t Bernoulli, own noise, K={k}", "bernoulli-independent", k, shared=False)
             for k in (4, 8, 16, 32, 64, 128)]  # fmt: skip
    steps = [
        Method("independent-t Bernoulli, common random numbers, K=32", "bernoulli-independent", 32),
        Method("stratified Bernoulli, common random numbers, K=32", "bernoulli", 32),
        Method("exact-count, own noise, K=32", "exact-count", 32, shared=False),
        Method("exact-count, common random numbers, K=32", "exact-count", 32),
        Method("exact-count, common random numbers, K=8", "exact-count", 8),
        Method("exact-count, common random numbers, K=4", "exact-count", 4),
        Method("exact-count antithetic, common random numbers, 16 pairs", "exact-count-antithetic", 16),
        Method("exact-count antithetic, common random numbers, 4 pairs", "exact-count-antithetic", 4),
    ]
    races = [
        Method(f"{name}, race to {draws}, z={z:g}", name, draws, z=z)
        for name, draws in (
            ("exact-count", 32),
            ("exact-count", 128),
            ("exact-count-antithetic", 16),
            ("exact-count-antithetic", 64),
        )
        for z in (1.0, 2.0, 3.0)
    ]
    return plain + steps + races


def variances(
    scorer: MaskedScorer, questions: Sequence[Question], *, passes: int, repeats: int, names: Sequence[str]
) -> dict[str, float]:
    """Variance in nats² of the estimate of one answer at equal passes, averaged over the first answers of ``questions``.

    Args:
        scorer: runs the passes.
        questions: their first choice is scored; random orders need ``passes`` to be a multiple of its length.
        passes: forward passes of every estimate.
        repeats: seeds.
        names: estimators.
    """
    result = {}
    for name in names:
        means = np.zeros((repeats, len(questions)))
        for seed in range(repeats):
            estimator = make_estimator(name, seed=seed)
            tallies = [Tally(question.choices[0], estimator) for question in questions]
            for tally in tallies:
                scorer.extend([tally], num_draws=max(passes // _passes_per_draw(estimator, tally), 1))
            means[seed] = [tally.values.mean() for tally in tallies]
        result[name] = float(means.var(axis=0, ddof=1).mean())
    return result
