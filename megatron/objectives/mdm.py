"""Masked diffusion language modelling with a random mask ratio (Sahoo et al., arXiv 2406.07524; Nie et al.,
arXiv 2502.09992; the recipe of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron.config.schema import Config
from megatron.model.mask import AttentionMask, Full
from megatron.objectives import noise
from megatron.objectives.base import ModelBatch

MIN_MASK_PROB = 1e-3


@dataclass(frozen=True)
class MaskedDiffusion:
    """Reconstruct masked tokens: ``loss = Σ_masked (ce / p) / (batch · seq)`` with ``p = (1 − 1e-3)·t + 1e-3``.

    One t ~ U(0, 1) per sequence, each token masked with probability p. In expectation over t and the mask the loss is an
    upper bound on the negative log-likelihood per token (arXiv 2502.09992, equation 3; the floor on p keeps the weights
    finite).

    Attributes:
        mask_token_id: id that replaces a masked token.
        global_batch_size: samples in a step, for stratified times.
        seed: seed of the noise.
        stratified: spread t over the global batch instead of independent draws.
        ar_ratio: probability that a sequence masks its last m tokens instead of m random ones.
        low_noise_samples: training samples for which t is scaled.
        low_noise_ratio: that scale.
        is_evaluation: take times that depend on nothing but sample and draw.
        draw: index of this draw of the noise (evaluation may average several).
        num_draws: how many draws there are; their times are spread evenly over [0, 1).
    """

    mask_token_id: int
    global_batch_size: int
    seed: int
    stratified: bool = True
    ar_ratio: float = 0.0
    low_noise_samples: int = 0
    low_noise_ratio: float = 1.0
    is_evaluation: bool = False
    draw: int = 0
    num_draws: int = 1
    attention_mask: AttentionMask = Full()
    label: str = "NLL bound"
    loss_fraction: float = 0.5 * (1 + MIN_MASK_PROB)

    @classmethod
    def from_config(cls, config: Config) -> MaskedDiffusion:
        """Build from a resolved configuration."""
        options, batch = config.objective, config.run.global_batch_size
        assert options.mask_token_id is not None and batch is not None
        return cls(
            mask_token_id=options.mask_token_id,
            global_batch_size=batch,
            seed=config.run.seed,
            stratified=not options.independent_t,
            ar_ratio=options.ar_ratio,
            low_noise_samples=options.low_noise_iter * batch if options.low_noise_start else 0,
            low_noise_ratio=options.low_noise_ratio,
        )

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Mask the first seq tokens; they are input and label alike. See :class:`Objective`."""
        labels = tokens[:, :-1].contiguous()
        mask_prob = self.mask_probabilities(sample_ids.numpy())
        masks = [self._mask(sample, p, labels.shape[1]) for sample, p in zip(sample_ids.tolist(), mask_prob)]
        is_masked = torch.from_numpy(np.stack(masks))
        weights = is_masked / torch.from_numpy(mask_prob).float().unsqueeze(-1)
        return ModelBatch.build(
            input_ids=labels.masked_fill(is_masked, self.mask_token_id),
            labels=labels,
            loss_weights=weights,
            sample_ids=sample_ids,
        )

    def mask_probabilities(self, sample_ids: np.ndarray) -> np.ndarray:
        """Probability p of masking a token of each sample, fp64 [batch]."""
        return (1 - MIN_MASK_PROB) * self.times(sample_ids) + MIN_MASK_PROB

    def times(self, sample_ids: np.ndarray) -> np.ndarray:
        """Diffusion time t of each sample, fp64 [batch]."""
        if self.is_evaluation:
            return noise.evaluation_times(sample_ids, draw=self.draw, num_draws=self.num_draws)
        t = noise.diffusion_times(
            self.seed, sample_ids, global_batch_size=self.global_batch_size, stratified=self.stratified
        )
        return np.where(sample_ids < self.low_noise_samples, t * self.low_noise_ratio, t)

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> MaskedDiffusion:
        """Plain random masking at all times, from a seed of its own: the same masks whatever the training did."""
        return replace(self, seed=noise.EVAL_SEED, ar_ratio=0.0, is_evaluation=True, draw=draw, num_draws=num_draws)

    def _mask(self, sample_id: int, mask_prob: float, seq_length: int) -> np.ndarray:
        """Which tokens of one sample are masked, bool [seq]."""
        random = noise.generator(self.seed + self.draw, sample_id)
        is_masked = random.random(seq_length, dtype=np.float32) < mask_prob
        if self.ar_ratio > 0 and random.random() < self.ar_ratio:
            first = seq_length - int(is_masked.sum())  # not a negative slice: m = 0 must mask nothing
            is_masked = np.arange(seq_length) >= first
        return is_masked
