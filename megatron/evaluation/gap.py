"""Likelihood gap between right and wrong answers of a small task: a metric of understanding during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron.errors import UserError
from megatron.evaluation.estimators import MaskedBound
from megatron.evaluation.lm_eval.tasks import read_jsonl
from megatron.evaluation.requests import encode_pair, windows
from megatron.evaluation.scorer import CausalScorer, MaskedScorer, Request
from megatron.inference.logits import LogitsFn
from megatron.model import Causal

if TYPE_CHECKING:
    from megatron.config.schema import Config
    from megatron.training.deepspeed.engine import Engine


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
            ValueError: a line without these fields, or an answer that does not fit.
        """
        questions, gold = [], []
        for number, item in enumerate(read_jsonl(path), 1):
            if not {"query", "choices", "gold"} <= set(item) or not 0 <= item["gold"] < len(item["choices"]):
                raise ValueError(
                    f"{path} line {number}: a question has query, choices and gold, the index of the right choice; correct it"
                )
            requests = []
            for choice in item["choices"]:
                context, target = encode_pair(encode, item["query"], f" {choice}")
                context = context or ([] if eod_id is None else [eod_id])
                pieces = windows(context, target, row_length=row_length, key=f"{path.name}/{number}")
                if len(pieces) > 1:
                    raise UserError(
                        f"{path} line {number}: an answer has {len(target)} tokens",
                        f"a row holds {row_length}",
                        "shorten it",
                    )
                requests.append(pieces[0])
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
        ``gap`` (nats per token), ``gap_se`` over questions, ``accuracy`` (right answer first by sum of log p), ``label``.
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


def gap_metric(config: Config, engine: Engine) -> Callable[[], dict[str, float | str]]:
    """The fields that ``--gap-task`` adds to a validation record: gap, gap_se, gap_accuracy, gap_label.

    Every data-parallel rank scores the whole (small) task: nothing is communicated, and all come to the same number.

    Raises:
        ValueError: bad questions, no tokenizer for the run's data, or an objective without a likelihood here.
    """
    from megatron.data.tokenizer import build_tokenizer
    from megatron.model import GPTModel
    from megatron.objectives import evaluation_objective

    objective = evaluation_objective(config)
    is_causal = isinstance(objective.attention_mask, Causal)
    mask_id = None if is_causal else config.objective.mask_token_id
    if not is_causal and mask_id is None:
        raise UserError(
            f"--gap-task with objective {config.objective.objective}",
            "answers are scored by causal models and by masked diffusion",
            "drop the flag",
        )
    tokenizer, length = build_tokenizer(config.data), config.model.seq_length
    assert config.run.gap_task is not None
    task = GapTask.load(
        Path(config.run.gap_task), tokenizer.encode, row_length=length + is_causal, eod_id=tokenizer.eod_id
    )
    model = engine.module
    assert isinstance(model, GPTModel)

    def measure() -> dict[str, float | str]:
        # Answers have all lengths: compiled blocks would be compiled again for each of them.
        with engine.evaluating(objective), torch.compiler.set_stance("force_eager"):
            result = likelihood_gap(
                model.logits, task, mask_id=mask_id, max_length=length, device=engine.context.device
            )
        return {name if name == "gap" else f"gap_{name.removeprefix('gap_')}": value for name, value in result.items()}

    return measure
