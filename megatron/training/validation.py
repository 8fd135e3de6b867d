"""Validation: the same samples and the same noise every time, with a standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron.data.loader import MicroBatchSampler, TokenDataset, build_loader
from megatron.objectives.base import NO_BOUND, Objective, is_exact
from megatron.training.deepspeed.engine import Engine

# Micro-batches in one pass of the pipeline: enough to fill it, few enough to keep the results of a pass small.
MICRO_BATCHES_PER_PASS = 8


@dataclass(frozen=True)
class ValidationResult:
    """Estimate of the loss over a validation set.

    Attributes:
        nll: mean loss in nats per token.
        nll_se: standard error of that mean over samples; None for a single sample.
        label: what the loss may be called; see ``megatron.objectives.base``.
        num_mc: noise draws per sample.
        num_samples: samples of seq_length tokens.
    """

    nll: float
    nll_se: float | None
    label: str
    num_mc: int
    num_samples: int

    def record(self, bytes_per_token: float | None) -> dict[str, float | int | str | None]:
        """Fields of a "valid" line of metrics.jsonl.

        Args:
            bytes_per_token: bytes of text per token of the validation data, where recorded.
        """
        is_likelihood = self.label != NO_BOUND
        per_byte = None if bytes_per_token is None else self.nll / math.log(2) / bytes_per_token
        return {
            "nll": self.nll,
            "nll_se": self.nll_se,
            "label": self.label,
            "num_mc": self.num_mc,
            "num_samples": self.num_samples,
            # Perplexity and bits per byte are names for a likelihood.
            "ppl": math.exp(min(self.nll, 700.0)) if is_likelihood else None,
            "bits_per_byte": per_byte if is_likelihood else None,
        }


def evaluate(
    engine: Engine,
    dataset: TokenDataset,
    objective: Objective,
    *,
    num_samples: int,
    num_mc: int = 1,
    num_workers: int = 0,
) -> ValidationResult:
    """Average the loss of ``num_samples`` samples over ``num_mc`` noise draws; a collective call.

    Samples are spread over the data-parallel ranks and put back in order, so the result does not depend on the layout.

    Args:
        engine: holds the model.
        dataset: validation samples; the first ``num_samples`` are used.
        objective: the training objective; its evaluation form decides what is measured.
        num_samples: validation samples.
        num_mc: draws per sample; an exact likelihood needs one and takes one.
        num_workers: data loader processes.
    """
    evaluated = objective.for_eval()
    draws = 1 if is_exact(evaluated) else num_mc
    table = np.empty((draws, num_samples))
    for draw in range(draws):
        view = objective.for_eval(draw, draws)
        with engine.evaluating(view):
            table[draw] = _one_draw(engine, dataset, view, num_samples, num_workers)
    per_sample = table.mean(axis=0)
    error = float(per_sample.std(ddof=1) / math.sqrt(num_samples)) if num_samples > 1 else None
    return ValidationResult(float(per_sample.mean()), error, evaluated.label, draws, num_samples)


def _one_draw(
    engine: Engine, dataset: TokenDataset, objective: Objective, num_samples: int, num_workers: int
) -> np.ndarray:
    """Loss of every sample under one draw of the noise, [num_samples] fp64, the same on every rank."""
    context, micro_batch_size = engine.context, engine.config.run.micro_batch_size
    loader = build_loader(
        dataset,
        objective,
        context,
        micro_batch_size=micro_batch_size,
        last_sample=num_samples,
        num_workers=num_workers,
    )
    ids = iter(MicroBatchSampler(first_sample=0, last_sample=num_samples, micro_batch_size=micro_batch_size,
                                 dp_rank=context.dp_rank, dp_size=context.dp_size))  # fmt: skip
    batches = iter(loader)
    own: list[tuple[list[int], list[float]]] = []
    while indices := [index for micro_batch in islice(ids, MICRO_BATCHES_PER_PASS) for index in micro_batch]:
        losses = engine.eval_step(batches, num_micro_batches=len(indices) // micro_batch_size)
        if context.tp_rank == 0 and losses.numel():
            own.append((indices, losses.tolist()))
    result = np.full(num_samples, np.nan)
    for parts in context.gather_objects(own):
        for indices, values in parts:
            for index, value in zip(indices, values):
                if index < num_samples:  # the last round is filled up with repeats
                    result[index] = value
    return result
