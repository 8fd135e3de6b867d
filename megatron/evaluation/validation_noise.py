"""What the noise of a validation costs: its loss under many noise seeds, measured on a trained masked diffusion model.

A run draws its noise from one fixed seed, so that its validations differ by the model only. Here the seed varies. Documents
packed into one sample see each other, as without ``--reset-attention-mask``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.config.schema import BERNOULLI, EXACT_COUNT
from megatron.data.dataset import BlendedDataset, GPTDataset
from megatron.data.loader import as_tensors, to_device
from megatron.errors import require
from megatron.inference.model import InferenceModel
from megatron.model.batch import Samples
from megatron.objectives.mdm import MaskedDiffusion
from megatron.randomness import EVAL_SEED
from megatron.runs.sums import reach
from megatron.statistics import ValidationSums, mean_loss


@dataclass(frozen=True)
class Repeats:
    """One validation set under many noise seeds.

    Attributes:
        sums: of each seed; their entries are the same (sample, document), in one order.
    """

    sums: list[ValidationSums]

    @property
    def loss(self) -> np.ndarray:
        """Sum of the losses of every entry, fp64 [seeds, entries]."""
        return np.stack([part.loss for part in self.sums])

    def variances(self) -> tuple[float, float]:
        """Variance over seeds of the loss per token: of one sample (mean over samples), and of the whole set."""
        first, loss = self.sums[0], self.loss
        samples = np.stack([np.bincount(first.sample, row) for row in loss]) / np.bincount(first.sample, first.tokens)
        whole = loss.sum(axis=1) / first.tokens.sum()
        return float(samples.var(axis=0, ddof=1).mean()), float(whole.var(ddof=1))

    def coverage(self, resamplings: int, *, seed: int = 0) -> tuple[float, float]:
        """Share of resamplings of documents and noise whose interval holds the mean over documents and noise: of
        ±1.96 errors, and of Student's interval.

        Documents are drawn with replacement; copies of one have noise of different seeds, as far as there are so many. Within
        one copy all documents of a sample share the noise of their sample.
        """
        first, loss, random = self.sums[0], self.loss, np.random.default_rng(seed)
        truth = loss.mean(axis=0).sum() / first.tokens.sum()
        names, owner = np.unique(first.document, return_inverse=True)
        held = np.zeros(2)
        for _ in range(resamplings):
            copies = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[owner]
            seeds, parts = random.permutation(len(loss)), []
            for copy in range(copies.max()):
                kept = copies > copy
                offsets = copy * (1 + first.sample.max()), copy * (1 + first.document.max())
                columns = (first.sample[kept] + offsets[0], first.document[kept] + offsets[1], first.tokens[kept])
                parts.append((*columns, loss[seeds[copy % len(seeds)], kept]))
            joined = [np.concatenate(column) for column in zip(*parts)]
            estimate = mean_loss(ValidationSums.collect(*joined, draws=first.draws))
            off = abs(estimate.value - truth)
            held += (off <= 1.96 * estimate.error, off <= reach(estimate))
        return float(held[0] / resamplings), float(held[1] / resamplings)


@torch.no_grad()
def repeat_validation(
    loaded: InferenceModel,
    dataset: GPTDataset | BlendedDataset,
    *,
    estimator: str,
    num_mc: int,
    repeats: int,
    batch_size: int = 64,
) -> Repeats:
    """Validate with ``repeats`` noise seeds.

    Args:
        loaded: a model of masked diffusion.
        dataset: validation samples.
        estimator: as ``--valid-estimator``.
        num_mc: draws of every sample.
        repeats: seeds.
        batch_size: samples per forward pass.

    Raises:
        UserError: the model is causal, one of blocks, or an ensemble.
    """
    require(
        not loaded.members, f"the ensemble {loaded.source}", "a validation is of one model", "name one of its members"
    )
    plain, shift = _plain(loaded, estimator), loaded.objective.decoding.shift
    ids = np.arange(dataset.num_samples)
    tokens = np.stack([dataset[index] for index in ids.tolist()])
    documents = np.stack([dataset.pieces(index).documents for index in ids.tolist()])[:, shift:]
    documents = documents[:, : tokens.shape[1] - 1]
    found = []
    for seed in range(repeats):
        loss, weight = np.zeros(documents.shape), np.zeros(documents.shape)
        for draw in range(num_mc):
            view = replace(plain.for_eval(draw, num_mc), seed=EVAL_SEED + seed * num_mc)
            for rows, losses, weights in _losses(loaded, view, tokens, batch_size):
                loss[rows] += losses / num_mc
                weight[rows] += weights / num_mc
        sums, excess = (ValidationSums.of_tokens(ids, documents, values) for values in (loss, weight - 1))
        given_back = excess.loss if estimator == EXACT_COUNT else 0.0
        found.append(
            ValidationSums.collect(sums.sample, sums.document, sums.tokens, sums.loss, given_back, draws=num_mc)
        )
    return Repeats(found)


@torch.no_grad()
def spread_by_share(
    loaded: InferenceModel, dataset: GPTDataset | BlendedDataset, *, parts: int, num_mc: int, batch_size: int = 64
) -> np.ndarray:
    """Standard deviation of what a draw of one sample adds to the bound, nats per token, in equal parts of the masked share,
    fp64 [parts]: what ``--noise-schedule measured`` takes. Texts differ and so do masks; both are in it, as in training.

    Args:
        loaded: a model of masked diffusion.
        dataset: samples.
        parts: of [0, 1].
        num_mc: draws of every sample, at stratified shares.
        batch_size: samples per forward pass.

    Raises:
        UserError: the model is causal, or one of blocks; or a part has fewer than two draws.
    """
    plain, ids = _plain(loaded, BERNOULLI), np.arange(dataset.num_samples)
    require(
        num_mc * len(ids) >= 4 * parts,
        f"{parts} parts with {num_mc} draws of {len(ids)} samples",
        "a spread needs several draws in each part",
        "draw more often (--num-mc), or take fewer parts",
    )
    tokens = np.stack([dataset[index] for index in ids.tolist()])
    found = np.zeros((2, num_mc, len(ids)))  # shares, losses
    for draw in range(num_mc):
        view = plain.for_eval(draw, num_mc)
        found[0, draw] = view.times(ids)
        for rows, losses, _ in _losses(loaded, view, tokens, batch_size):
            found[1, draw, rows] = losses.mean(axis=1)
    part = np.minimum((found[0] * parts).astype(int), parts - 1)
    return np.array([found[1][part == own].std(ddof=1) for own in range(parts)])


def _plain(loaded: InferenceModel, estimator: str) -> MaskedDiffusion:
    loaded.require_whole_sequences()
    shifted = loaded.objective.decoding.shift == 1
    return MaskedDiffusion(loaded.mask_id, 1, seed=0, valid_estimator=estimator, shifted=shifted)


def _losses(
    loaded: InferenceModel, view: MaskedDiffusion, tokens: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Samples with the losses and the weights of their tokens in one draw, fp64 [rows, seq], a batch at a time."""
    ids = np.arange(len(tokens))
    for rows in np.array_split(ids, -(-len(ids) // batch_size)):
        batch = to_device(as_tensors(view.prepare(Samples(tokens[rows], rows))), loaded.device)
        losses = loaded.model(batch, view.attention_mask, view.loss, per_token=True)
        yield rows, losses.double().cpu().numpy(), batch.targets.loss_weights.double().cpu().numpy()
