"""Likelihood gap between right and wrong answers of a small task: a metric of understanding during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.config.schema import Config
from megatron.data.jsonl import read_items
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import require
from megatron.evaluation.estimators import MaskedBound
from megatron.evaluation.requests import encode_pair, windows
from megatron.evaluation.scorer import CausalScorer, MaskedScorer, Request
from megatron.inference.logits import LogitsFn
from megatron.objectives import build_objective
from megatron.objectives.base import CausalDecoding, MaskedDecoding


@dataclass(frozen=True)
class GapTask:
    """Tokenised questions: the requests of all answers, and which one of each question is right."""

    questions: tuple[tuple[Request, ...], ...]
    gold: tuple[int, ...]

    @classmethod
    def load(
        cls, path: Path, encode: Callable[[str], list[int]], *, row_length: int, eod_id: int | None = None
    ) -> GapTask:
        """Read a JSONL file of ``{"query", "choices", "gold"}``.

        Args:
            path: the file.
            encode: text to ids.
            row_length: tokens of query and answer together; longer queries lose their left end.
            eod_id: context of an empty query.

        Raises:
            UserError: a line without these fields, or an answer that does not fit.
        """
        questions, gold = [], []
        for number, item in read_items(path):
            require(
                _is_question(item),
                f"{path} line {number} is no question",
                "it has query, choices (a list of texts) and gold, the index of the right one",
                "correct it",
            )
            requests = []
            for choice in item["choices"]:
                context, target = encode_pair(encode, item["query"], f" {choice}")
                context = context or ([] if eod_id is None else [eod_id])
                require(
                    context and target and len(target) < row_length,
                    f"{path} line {number}: a query of {len(context)} and an answer of {len(target)} tokens",
                    f"both have at least one, and a row holds {row_length}",
                    "shorten or complete it",
                )
                requests += windows(context, target, row_length=row_length, key=f"{path.name}/{number}")
            require(
                len(requests) > 1,
                f"{path} line {number} has one choice",
                "a gap is between a right and a wrong answer",
                "add choices",
            )
            questions.append(tuple(requests))
            gold.append(int(item["gold"]))
        return cls(tuple(questions), tuple(gold))


def likelihood_gap(
    logits_fn: LogitsFn,
    task: GapTask,
    *,
    mask_id: int | None,
    max_length: int,
    num_mc: int = 16,
    batch_size: int = 32,
    device: Any = "cpu",
) -> dict[str, float | str]:
    """Mean over questions of (log p of the right answer − mean log p of the wrong ones) per token of the answers.

    Each log p is divided by its number of tokens. Masked diffusion (``mask_id`` given) uses the exact-count bound with
    ``num_mc`` antithetic pairs of masks and fixed noise, so the curve over training moves with the model only.

    Returns:
        ``gap`` (nats per token), ``gap_se`` (its standard error over questions; the masks are fixed),
        ``accuracy`` (right answer first by sum of log p), ``label``.
    """
    requests = [request for question in task.questions for request in question]
    if mask_id is None:
        estimates = CausalScorer(logits_fn, max_length=max_length, batch_size=batch_size, device=device).score(requests)
    else:
        scorer = MaskedScorer(logits_fn, mask_id=mask_id, max_length=max_length, batch_size=batch_size, device=device)
        estimates = scorer.score(requests, MaskedBound(antithetic=True), num_draws=num_mc)
    values = iter(estimates)
    gaps, right = [], []
    for question, gold in zip(task.questions, task.gold):
        sums = np.array([next(values).value for _ in question])
        means = sums / [len(request.target) for request in question]
        gaps.append(means[gold] - np.delete(means, gold).mean())
        right.append(int(sums.argmax()) == gold)
    return {
        "gap": float(np.mean(gaps)),
        "gap_se": float(np.std(gaps, ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else float("nan"),
        "accuracy": float(np.mean(right)),
        "label": "exact" if mask_id is None else "bound",
    }


def gap_metric(
    config: Config,
    *,
    logits_fn: LogitsFn,
    evaluating: Callable[[], AbstractContextManager[Any]],
    device: torch.device | str,
) -> Callable[[], dict[str, float | str]]:
    """The fields that ``--gap-task`` adds to a validation record: gap, gap_se (over questions), gap_accuracy, gap_label.

    Every data-parallel rank scores the whole (small) task: nothing is communicated, and all come to the same number.

    Args:
        config: of the run.
        logits_fn: the model that is trained.
        evaluating: gives a context in which the model is in evaluation mode, with the attention of evaluation.
        device: of the input ids.

    Raises:
        UserError: bad questions, no tokenizer for the run's data, or an objective without a likelihood here.
    """
    decoding = build_objective(config).for_eval().decoding
    is_causal = isinstance(decoding, CausalDecoding)
    mask_id = decoding.mask_token_id if isinstance(decoding, MaskedDecoding) else None
    require(
        is_causal or mask_id is not None,
        f"--gap-task with objective {config.objective.objective}",
        "answers are scored by causal models and by masked diffusion",
        "drop the flag",
    )
    tokenizer, length = build_tokenizer(config.data), config.model.seq_length
    task = GapTask.load(
        Path(config.run.gap_task or ""), tokenizer.encode, row_length=length + is_causal, eod_id=tokenizer.eod_id
    )

    def measure() -> dict[str, float | str]:
        # Answers have all lengths: compiled blocks would be compiled again for each of them.
        with evaluating(), torch.compiler.set_stance("force_eager"):
            result = likelihood_gap(logits_fn, task, mask_id=mask_id, max_length=length, device=device)
        return {name if name == "gap" else f"gap_{name.removeprefix('gap_')}": value for name, value in result.items()}

    return measure


def _is_question(item: dict[str, Any]) -> bool:
    query, choices, gold = item.get("query"), item.get("choices"), item.get("gold")
    if (
        not isinstance(query, str)
        or not isinstance(choices, list)
        or not all(isinstance(text, str) for text in choices)
    ):
        return False
    return isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)
