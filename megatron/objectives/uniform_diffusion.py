"""Uniform-state diffusion: noise replaces tokens by random ones (Austin et al., arXiv 2107.03006; Schiff et al.,
arXiv 2412.10193; Sahoo et al., arXiv 2506.10892; arXiv 2602.15014)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from megatron import randomness as noise
from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME
from megatron.errors import require
from megatron.model.batch import Inputs, ModelBatch, Samples, Targets, build_batch
from megatron.model.loss import HeadOutput, LossKind
from megatron.model.mask import AttentionMask, Full
from megatron.objectives.base import BOUND, Decoding, Setting, UniformDecoding, first_tokens
from megatron.objectives.mdm import TimeOptions
from megatron.objectives.schedules import Linear, bound_weight, mask_probability
from megatron.objectives.vocabulary import VocabularyOptions

if TYPE_CHECKING:
    import torch

    from megatron.parallel.context import ParallelContext

# Shares of noise so near 0 or 1 that odds overflow or vanish; an exact count comes there once in 10^9 / seq draws.
LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class UniformOptions(VocabularyOptions, TimeOptions):
    """Flags of uniform-state diffusion."""


@dataclass(frozen=True)
class UniformBound(LossKind):
    """``Σ loss_weights · Σ_j D(r_j ‖ rθ_j)/k / Σ num_tokens``, see :mod:`megatron.parallel.uniform_bound`.

    Attributes:
        vocab_size: tokens V that noise draws from; the softmax runs over them and over no other row.
    """

    vocab_size: int

    def head_loss(
        self, output: HeadOutput, targets: Targets[torch.Tensor], context: ParallelContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`LossKind`."""
        from megatron.parallel.uniform_bound import linear_uniform_bound

        assert targets.noised is not None and targets.odds is not None
        states = (targets.labels, targets.noised, targets.odds)
        return linear_uniform_bound(output, states, targets.loss_weights, context, vocab_size=self.vocab_size)


class NoiseDraw(NamedTuple):
    """The noise of one draw.

    Attributes:
        tokens: [batch, seq] int64, what a noised position shows.
        is_noised: [batch, seq] bool; a noised position may by chance show its own token.
        share: [batch] expected share of noised positions, 1 − α.
        weight: [batch] of every position in the loss.
    """

    tokens: np.ndarray
    is_noised: np.ndarray
    share: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class UniformDiffusion:
    """Reconstruct tokens some of which were replaced by uniformly random ones, without knowing which.

    With α the visible share z_i is x_i with probability α, else uniform over the V tokens. The loss is the density ℓ of the
    bound (:mod:`megatron.parallel.uniform_bound`) at all positions, ``Σ weight · ℓ·(1 − α)/(−α') / (batch · seq)``, and its
    expectation over the noise the bound itself: no schedule appears in it, as in ``schedules.py``. The model is not told
    the time; the loss is.

    Noise is drawn by counts: m ~ U{0 … L} positions of a sequence of L, chosen uniformly, are noised. That is the
    distribution of independent coins whose probability 1 − α is uniform, and given m it has the density Beta(m + 1, L − m + 1).
    A position that shows another token adds about 1/(1 − α), which has no variance there; so 1 − α is drawn from
    Beta(m, L − m + 1) instead, and the ratio of the two leaves the weight (L + 1)/m (without noise, m = 0, where ℓ is of
    order 1 − α: 1/(1 − α)). Exact, without a floor on the share.

    Attributes:
        vocab_size: tokens V that noise draws from.
        global_batch_size: samples in a step, for stratified times.
        seed: seed of the noise.
        stratified: spread the counts over the global batch instead of independent draws.
        scheme: order of stratified times, :data:`megatron.config.schema.NOISE_SCHEME`.
        valid_estimator: how evaluation draws: by counts in complementary pairs, or by coins at a share of at least 1e-3.
        is_evaluation: take times that depend on nothing but sample and draw.
        draw, num_draws: which draw of the noise this is, of how many.
    """

    vocab_size: int
    global_batch_size: int
    seed: int
    stratified: bool = True
    scheme: int = NOISE_SCHEME
    valid_estimator: str = EXACT_COUNT
    is_evaluation: bool = False
    draw: int = 0
    num_draws: int = 1
    attention_mask: AttentionMask = Full()
    label: str = BOUND
    loss_fraction: float = 1.0
    num_views: ClassVar[int] = 1
    beside: ClassVar[None] = None
    needs_mask_token: ClassVar[bool] = False
    Options: ClassVar[type] = UniformOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> UniformDiffusion:
        """See :class:`Objective`."""
        assert isinstance(options, UniformOptions)
        size = options.noise_vocab_size
        require(size, "no vocabulary", "noise draws from its tokens", "pass --noise-vocab-size N")
        return cls(
            vocab_size=size or 0,
            global_batch_size=setting.global_batch_size,
            seed=setting.seed,
            stratified=not options.independent_t,
            scheme=setting.scheme,
            valid_estimator=setting.valid_estimator,
        )

    @property
    def loss(self) -> LossKind:
        """The bound over V tokens."""
        return UniformBound(self.vocab_size)

    @property
    def decoding(self) -> Decoding:
        """Noise, turned into tokens."""
        return UniformDecoding(self.vocab_size)

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Noise the first seq tokens; all of them are labels. See :class:`Objective`."""
        labels = samples.tokens[:, :-1]
        drawn = self.noise(samples.ids, labels.shape[1])
        noised = np.where(drawn.is_noised, drawn.tokens, labels)
        weights, odds = (np.broadcast_to(row[:, None], labels.shape) for row in (drawn.weight, self.odds(drawn.share)))
        positions, segments = first_tokens(samples.position_ids), first_tokens(samples.segment_ids)
        batch = build_batch(
            Inputs(noised, positions, samples.ids, segments),
            labels=labels,
            loss_weights=weights,
            has_loss=first_tokens(samples.loss_mask),
        )
        return batch._replace(targets=batch.targets._replace(noised=noised, odds=odds.astype(np.float32)))

    def odds(self, share: np.ndarray) -> np.ndarray:
        """k = V·α/(1 − α), fp64."""
        return self.vocab_size * (1 - share) / share

    def noise(self, sample_ids: np.ndarray, seq_length: int) -> NoiseDraw:
        """The noise of some samples in this draw."""
        rows = [self._row(sample, t, seq_length) for sample, t in zip(sample_ids.tolist(), self._times(sample_ids))]
        return NoiseDraw(*(np.stack(column) for column in zip(*rows)))

    def _row(self, sample_id: int, t: float, length: int) -> tuple[np.ndarray, np.ndarray, float, float]:
        """The fields of :class:`NoiseDraw` for one sample."""
        if self.is_evaluation and self.valid_estimator != EXACT_COUNT:
            random = noise.generator(self.seed + self.draw, noise.Purpose.NOISE, sample_id)
            share, weight = (float(of(Linear(), np.asarray(t))) for of in (mask_probability, bound_weight))
            return random.integers(self.vocab_size, size=length), random.random(length) < share, inner(share), weight
        pair, is_second = divmod(self.draw, 2)
        if 2 * pair + 1 < self.num_draws:  # two draws at t/2 and 1 − t/2 noise every position
            t = 1 - t / 2 if is_second else t / 2
        random = noise.generator(self.seed + pair, noise.Purpose.NOISE, sample_id)
        return noise_by_count(random, t, length, vocab_size=self.vocab_size, is_second=bool(is_second))

    def _times(self, sample_ids: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each sample, fp64 [batch]."""
        if self.is_evaluation:
            draws_a_time = 2 if self.valid_estimator == EXACT_COUNT else 1
            draw, num_draws = self.draw // draws_a_time, -(-self.num_draws // draws_a_time)
            return noise.evaluation_times(sample_ids, draw=draw, num_draws=num_draws, seed=self.seed)
        return noise.diffusion_times(
            self.seed,
            sample_ids,
            global_batch_size=self.global_batch_size,
            stratified=self.stratified,
            scheme=self.scheme,
        )

    def token_weights(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """Those of noised positions, see :class:`Objective`."""
        drawn = self.noise(sample_ids, seq_length)
        return drawn.is_noised * drawn.weight[:, None]

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> UniformDiffusion:
        """The same with the seed of evaluation."""
        return replace(self, seed=noise.EVAL_SEED, is_evaluation=True, draw=draw, num_draws=num_draws)


def noise_by_count(
    random: np.random.Generator, t: float, length: int, *, vocab_size: int, is_second: bool = False
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The noise of one sequence, see :class:`UniformDiffusion`.

    Args:
        random: its numbers.
        t: in [0, 1); chooses the count, ⌊t·(length + 1)⌋.
        length: positions.
        vocab_size: V.
        is_second: noise from the other end of the order of the positions.

    Returns:
        The fields of :class:`NoiseDraw` without a batch; the weight is that of ``ℓ·(1 − α)/(−α')``.
    """
    count = min(int(t * (length + 1)), length)
    tokens, order = random.integers(vocab_size, size=length), random.permutation(length)
    is_noised = np.zeros(length, dtype=bool)
    is_noised[order[::-1][:count] if is_second else order[:count]] = True
    share = inner(random.beta(max(count, 1), length - count + 1))
    return tokens, is_noised, share, (length + 1) / count if count else 1 / share


def inner(share: float) -> float:
    """A share of noise with odds that are neither 0 nor infinite."""
    return min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
