"""Masked diffusion language modelling with a random mask ratio (Sahoo et al., arXiv 2406.07524; Nie et al.,
arXiv 2502.09992; the recipe of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from megatron import randomness as noise
from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask, Full, Segments
from megatron.objectives.base import BOUND, NO_BOUND
from megatron.objectives.schedules import (
    Linear,
    Schedule,
    bound_weight,
    build_schedule,
    mask_probability,
    mean_mask_probability,
)


@dataclass(frozen=True)
class MaskedDiffusion:
    """Reconstruct masked tokens: ``loss = Σ_masked (ce / p) / (batch · seq)`` with ``p = (1 − 1e-3)·t + 1e-3``.

    One t ~ U(0, 1) per sequence, each token masked with probability p. In expectation over t and the mask the loss is an
    upper bound on the negative log-likelihood per token (arXiv 2502.09992, equation 3; the floor on p keeps the weights
    finite). Other schedules give another p(t) and weight; see ``schedules.py``.

    With ``ar_ratio`` or in the low-noise iterations the positions or the times are not those of the bound, and the
    training loss is none.

    Attributes:
        mask_token_id: id that replaces a masked token.
        global_batch_size: samples in a step, for stratified times.
        seed: seed of the noise.
        stratified: spread t over the global batch instead of independent draws.
        schedule: mask probability as a function of t.
        ar_ratio: probability that a sequence masks its last m tokens instead of m random ones.
        low_noise_samples: training samples for which t is scaled.
        low_noise_ratio: that scale.
        random_length_ratio: probability that a sequence is cut at a uniformly random length (1 % in arXiv 2502.09992,
            §2.2). Both parts are kept, as two sequences that see nothing of each other and begin at position 0: no
            padding, no token lost.
        always_positions: give every batch positions, not only those with a cut (pipeline stages want one form).
        is_evaluation: take times that depend on nothing but sample and draw.
        draw: index of this draw of the noise (evaluation may average several).
        num_draws: how many draws there are; their times are spread evenly over [0, 1).
    """

    mask_token_id: int
    global_batch_size: int
    seed: int
    stratified: bool = True
    schedule: Schedule = Linear()
    ar_ratio: float = 0.0
    low_noise_samples: int = 0
    low_noise_ratio: float = 1.0
    random_length_ratio: float = 0.0
    always_positions: bool = False
    is_evaluation: bool = False
    draw: int = 0
    num_draws: int = 1
    needs_mask_token: ClassVar[bool] = True
    default_schedule: ClassVar[str] = "linear"

    @classmethod
    def from_config(cls, config: Config) -> MaskedDiffusion:
        """Build from a resolved configuration."""
        options, batch = config.objective, config.run.global_batch_size
        assert batch is not None
        return cls(
            **cls.noise_options(config),
            ar_ratio=options.ar_ratio,
            low_noise_samples=options.low_noise_iter * batch if options.low_noise_start else 0,
            low_noise_ratio=options.low_noise_ratio,
            random_length_ratio=options.random_length_ratio,
            always_positions=config.parallel.pipeline_model_parallel_size > 1,
        )

    @classmethod
    def noise_options(cls, config: Config) -> dict[str, Any]:
        """Fields that all kinds of masked diffusion take from the configuration."""
        options = config.objective
        assert options.mask_token_id is not None and config.run.global_batch_size is not None
        return {
            "mask_token_id": options.mask_token_id,
            "global_batch_size": config.run.global_batch_size,
            "seed": config.run.seed,
            "stratified": not options.independent_t,
            "schedule": build_schedule(options.noise_schedule or cls.default_schedule, options.noise_schedule_power),
        }

    @property
    def attention_mask(self) -> AttentionMask:
        """Bidirectional; within the parts of a cut sequence where there are any."""
        return Segments() if self.random_length_ratio > 0 else Full()

    @property
    def label(self) -> str:
        """What the loss may be called."""
        return NO_BOUND if self.ar_ratio > 0 or self.low_noise_samples > 0 else BOUND

    @property
    def loss_fraction(self) -> float:
        """Expected share of masked tokens."""
        return mean_mask_probability(self.schedule)

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Mask the first seq tokens; they are input and label alike. See :class:`Objective`."""
        labels = tokens[:, :-1].contiguous()
        is_masked, weights = self.masks_and_weights(sample_ids.numpy(), labels.shape[1])
        return ModelBatch.build(
            input_ids=labels.masked_fill(is_masked, self.mask_token_id),
            labels=labels,
            loss_weights=weights,
            sample_ids=sample_ids,
            position_ids=self._positions(sample_ids.tolist(), labels.shape[1]),
        )

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are masked, bool, and their weights in the loss, fp32, 0 elsewhere; both [batch, seq]."""
        t = self.token_times(sample_ids, seq_length)
        mask_prob = mask_probability(self.schedule, t)
        rows = [self._mask(sample, p, seq_length) for sample, p in zip(sample_ids.tolist(), mask_prob)]
        is_masked = torch.from_numpy(np.stack(rows))
        return is_masked, is_masked * torch.from_numpy(self.masked_weight(t)).float()

    def masked_weight(self, t: np.ndarray) -> np.ndarray:
        """Weight of a masked token at time t, fp64."""
        return bound_weight(self.schedule, t)

    def token_times(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """Diffusion time of each token, fp64, broadcastable to [batch, seq]: one for the sequence."""
        return self.times(sample_ids)[:, None]

    def times(self, sample_ids: np.ndarray) -> np.ndarray:
        """Diffusion time t of each sample, fp64 [batch]."""
        if self.is_evaluation:
            return noise.evaluation_times(sample_ids, draw=self.draw, num_draws=self.num_draws)
        t = noise.diffusion_times(
            self.seed, sample_ids, global_batch_size=self.global_batch_size, stratified=self.stratified
        )
        return np.where(sample_ids < self.low_noise_samples, t * self.low_noise_ratio, t)

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> MaskedDiffusion:
        """Plain random masking under the linear schedule, from a seed of its own: the same masks whatever the training
        did. So runs with different training noise are judged by the same numbers."""
        return MaskedDiffusion(
            mask_token_id=self.mask_token_id,
            global_batch_size=self.global_batch_size,
            seed=noise.EVAL_SEED,
            is_evaluation=True,
            draw=draw,
            num_draws=num_draws,
        )

    def _mask(self, sample_id: int, mask_prob: np.ndarray, seq_length: int) -> np.ndarray:
        """Which tokens of one sample are masked, bool [seq]."""
        random = noise.generator(self.seed + self.draw, sample_id)
        is_masked = random.random(seq_length, dtype=np.float32) < mask_prob
        if self.ar_ratio > 0 and random.random() < self.ar_ratio:
            first = seq_length - int(is_masked.sum())  # not a negative slice: m = 0 must mask nothing
            is_masked = np.arange(seq_length) >= first
        return is_masked

    def _positions(self, sample_ids: list[int], seq_length: int) -> torch.Tensor | None:
        """Positions [batch, seq] that begin again where a sequence is cut; None where the batch has no cut."""
        lengths = torch.tensor([self._first_length(sample, seq_length) for sample in sample_ids]).unsqueeze(-1)
        if not self.always_positions and bool((lengths == seq_length).all()):
            return None
        positions = torch.arange(seq_length)
        return torch.where(positions < lengths, positions, positions - lengths)

    def _first_length(self, sample_id: int, seq_length: int) -> int:
        """Length of the first part of a sample: ``seq_length``, or where it is cut."""
        if self.random_length_ratio == 0.0:
            return seq_length
        random = noise.generator(self.seed, sample_id, noise.STREAM_LENGTH)
        return int(random.integers(1, seq_length + 1)) if random.random() < self.random_length_ratio else seq_length
