"""Masked diffusion language modelling with a random mask ratio (Sahoo et al., arXiv 2406.07524; Nie et al.,
arXiv 2502.09992; the recipe of arXiv 2507.15857)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from typing_extensions import Self

from megatron import randomness as noise
from megatron.config.option import POSITIVE, PROBABILITY, Range, option
from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME
from megatron.errors import require
from megatron.model.batch import Inputs, ModelBatch, Samples, build_batch, second_view
from megatron.model.loss import LossKind, WeightedCrossEntropy
from megatron.model.mask import AttentionMask, Full, WithinSegments
from megatron.objectives.base import BOUND, NO_BOUND, Decoding, MaskedDecoding, Objective, Setting, first_tokens
from megatron.objectives.schedules import (
    BOUND_WEIGHTING,
    SCHEDULES,
    WEIGHTINGS,
    Linear,
    Schedule,
    build_schedule,
    is_symmetric,
    mask_probability,
    mean_mask_probability,
)


@dataclass(frozen=True)
class TimeOptions:
    """Flags of everything that draws diffusion times."""

    independent_t: bool = option(
        False, "draw the diffusion time of every sample independently instead of stratified over the global batch"
    )


@dataclass(frozen=True)
class ScheduleOptions(TimeOptions):
    """Flags of everything that masks by a schedule."""

    # fmt: off
    noise_schedule: str | None = option(None, "masked share as a function of t: linear t, cosine sin(pi*t/2), "
        "polynomial t^power; bell, measured: a density of the share, with importance weights; default: linear "
        "(maskgit: cosine)", choices=tuple(SCHEDULES))
    noise_schedule_power: float | None = option(None, "power of the polynomial schedule; default: 2", unit="POWER",
        range=Range(at_least=1, at_most=100), needs=("noise_schedule=polynomial",))
    noise_schedule_depth: float | None = option(None, "density 1 - depth*cos(2*pi*share) of the bell; default: 0.8",
        unit="DEPTH", range=Range(at_least=0, at_most=0.999), needs=("noise_schedule=bell",))
    noise_schedule_spread: str | None = option(None, "spread of the loss in n equal parts of the shares, to which the "
        "measured density is proportional, such as 1.4,1.0,0.8,0.9", unit="S,S,...", needs=("noise_schedule=measured",))
    # fmt: on


@dataclass(frozen=True)
class MaskedDiffusionOptions(ScheduleOptions):
    """Flags of masked diffusion."""

    # fmt: off
    loss_weighting: str = option(BOUND_WEIGHTING, "weight of a masked token: that of the likelihood bound, or the same at all "
        "times; validation keeps the bound's", choices=tuple(WEIGHTINGS))
    ar_ratio: float = option(0.0, "probability that a sequence masks its last tokens instead of random ones", unit="P",
        range=PROBABILITY)
    low_noise_start: bool = option(False, "scale the diffusion time down in the first iterations")
    low_noise_iter: int | None = option(None, "iterations with scaled time; default: 1000", unit="ITERS",
        range=POSITIVE, needs=("low_noise_start",))
    low_noise_ratio: float | None = option(None, "factor on the time in those iterations; default: 0.5", unit="RATIO",
        range=Range(above=0, at_most=1), needs=("low_noise_start",))
    random_length_ratio: float = option(0.0, "probability that a sequence is cut in two at a uniformly random length",
        unit="P", range=PROBABILITY)
    shifted_labels: bool = option(False, "predict a masked token from the position before it, as AR does; the first token "
        "of a sample is given")
    complementary_masks: bool = option(False, "every sample twice in its micro-batch, under a mask and its complement")
    # fmt: on


@dataclass(frozen=True)
class MaskedDiffusion:
    """Reconstruct masked tokens: ``loss = Σ_masked (ce / p) / (batch · seq)`` with ``p = (1 − 1e-3)·t + 1e-3``.

    One t ~ U(0, 1) per sequence, each token masked with probability p. In expectation over t and the mask the loss is an
    upper bound on the negative log-likelihood per token (arXiv 2502.09992, equation 3; the floor on p keeps the weights
    finite). Other schedules give another p(t) and weight; see ``schedules.py``.

    With ``ar_ratio`` or in the low-noise iterations the positions or the times are not those of the bound, and with flat
    weights the weights are not: the training loss is none.

    Attributes:
        mask_token_id: id that replaces a masked token.
        global_batch_size: samples in a step, for stratified times.
        seed: seed of the noise.
        stratified: spread t over the global batch instead of independent draws.
        schedule: mask probability as a function of t.
        weighting: weight of a masked token, one of ``WEIGHTINGS`` of ``schedules.py``.
        ar_ratio: probability that a sequence masks its last m tokens instead of m random ones.
        low_noise_samples: training samples for which t is scaled.
        low_noise_ratio: that scale.
        random_length_ratio: probability that a sequence is cut at a uniformly random length (1 % in arXiv 2502.09992,
            §2.2). Both parts are kept, as two sequences that see nothing of each other and begin at position 0: no
            padding, no token lost.
        shifted: a masked token is predicted from the position before it; the loss then bounds −log p of the last seq tokens
            of a sample given its first one, as AR's does.
        complementary: every sample is in its micro-batch twice, under a mask at t and under one at 1 − t that the same coins
            decide from their other end: every token is masked in one of them (one in a thousand in both), and the mean of
            the two losses has the expectation of each.
        half: 1 or 2: which view of such a pair this is; 0: none.
        scheme: order of stratified times, :data:`megatron.config.schema.NOISE_SCHEME`.
        valid_estimator: how evaluation masks: as training does, or in complementary pairs of exact counts.
        is_evaluation: take times that depend on nothing but sample and draw.
        draw: index of this draw of the noise (evaluation may average several).
        num_draws: how many draws there are; their times are spread evenly over [0, 1).
    """

    mask_token_id: int
    global_batch_size: int
    seed: int
    stratified: bool = True
    schedule: Schedule = Linear()
    weighting: str = BOUND_WEIGHTING
    ar_ratio: float = 0.0
    low_noise_samples: int = 0
    low_noise_ratio: float = 1.0
    random_length_ratio: float = 0.0
    shifted: bool = False
    complementary: bool = False
    half: int = 0
    scheme: int = NOISE_SCHEME
    valid_estimator: str = EXACT_COUNT
    is_evaluation: bool = False
    draw: int = 0
    num_draws: int = 1
    loss: LossKind = WeightedCrossEntropy()
    needs_mask_token: ClassVar[bool] = True
    default_schedule: ClassVar[str] = "linear"
    Options: ClassVar[type] = MaskedDiffusionOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> MaskedDiffusion:
        """See :class:`Objective`; variants have some of the options.

        The reference's defaults of low-noise starts: 1,000 iterations, ratio 0.5.
        """
        assert isinstance(options, TimeOptions)
        built = cls.plain(options, setting)
        if not isinstance(options, MaskedDiffusionOptions):
            return built
        require(
            not options.complementary_masks
            or (is_symmetric(built.schedule) and options.ar_ratio == 0 and not options.low_noise_start),
            "--complementary-masks with an asymmetric --noise-schedule, --ar-ratio or --low-noise-start",
            "a mask and its complement are draws of one law at t and 1 - t",
            "drop one of them (linear and bell are symmetric)",
        )
        low_noise_iters = (options.low_noise_iter or 1000) if options.low_noise_start else 0
        return replace(
            built,
            weighting=options.loss_weighting,
            ar_ratio=options.ar_ratio,
            low_noise_samples=low_noise_iters * setting.global_batch_size,
            low_noise_ratio=options.low_noise_ratio or 0.5,
            random_length_ratio=options.random_length_ratio,
            shifted=options.shifted_labels,
            complementary=options.complementary_masks,
        )

    @classmethod
    def plain(cls, options: TimeOptions, setting: Setting) -> Self:
        """An objective with what all kinds of masked diffusion share, and the defaults of its own fields."""
        assert setting.mask_token_id is not None
        schedule = build_schedule(cls.default_schedule)
        if isinstance(options, ScheduleOptions) and options.noise_schedule:
            name = options.noise_schedule
            power, depth, spread = (getattr(options, f"noise_schedule_{x}") for x in ("power", "depth", "spread"))
            require(spread or name != "measured", "--noise-schedule measured", "it follows the spread of the loss",
                    "pass --noise-schedule-spread S,S,...")  # fmt: skip
            schedule = build_schedule(name, power=power, depth=depth, spread=spread)
        return cls(
            mask_token_id=setting.mask_token_id,
            global_batch_size=setting.global_batch_size,
            seed=setting.seed,
            scheme=setting.scheme,
            valid_estimator=setting.valid_estimator,
            stratified=not options.independent_t,
            schedule=schedule,
        )

    @property
    def attention_mask(self) -> AttentionMask:
        """Bidirectional; within the parts of a cut sequence where there are any."""
        return WithinSegments(Full()) if self.random_length_ratio > 0 else Full()

    @property
    def decoding(self) -> Decoding:
        """Masked tokens, in any order."""
        return MaskedDecoding(self.mask_token_id, shift=int(self.shifted))

    @property
    def num_views(self) -> int:
        """Two where every sample is there with the complement of its mask."""
        return 1 + self.complementary

    @property
    def beside(self) -> Objective | None:
        """There is no other way to decode it."""
        return None

    @property
    def label(self) -> str:
        """What the loss may be called."""
        is_bound = self.weighting == BOUND_WEIGHTING and self.ar_ratio == 0 and self.low_noise_samples == 0
        return BOUND if is_bound else NO_BOUND

    @property
    def loss_fraction(self) -> float:
        """Expected share of masked tokens; a mask and its complement cover all of them."""
        return 1.0 if self.complementary else mean_mask_probability(self.schedule)

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Mask the first seq tokens, which are input and label alike; see :class:`Objective`.

        Where labels are shifted, the last seq tokens are masked, each of them the label of the position before it; of the
        last one the input has no place, so the model does not see it when it is not masked, either.
        """
        if self.complementary:
            return second_view(*(replace(self, complementary=False, half=half).prepare(samples) for half in (1, 2)))
        inputs, shift = samples.tokens[:, :-1], int(self.shifted)
        labels = samples.tokens[:, shift:][:, : inputs.shape[1]]
        is_masked, weights = self.masks_and_weights(samples.ids, inputs.shape[1])
        is_hidden = np.pad(is_masked, ((0, 0), (shift, 0)))[:, : inputs.shape[1]]
        positions, segments = self._cut(samples)
        return build_batch(
            Inputs(np.where(is_hidden, self.mask_token_id, inputs), positions, samples.ids, segments),
            labels=labels,
            loss_weights=weights / 2 if self.half else weights,
            has_loss=first_tokens(samples.loss_mask),
        )

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are masked, bool, and their weights in the loss, fp32, 0 elsewhere; both [batch, seq]."""
        t = self.token_times(sample_ids, seq_length)
        if self.half == 2:
            t = 1 - t
        if self.has_exact_counts:
            return self._exact_counts(sample_ids, np.broadcast_to(t, (len(sample_ids), seq_length)))
        mask_prob = mask_probability(self.schedule, t)
        is_masked = np.stack([self._mask(sample, p, seq_length) for sample, p in zip(sample_ids.tolist(), mask_prob)])
        return is_masked, is_masked * WEIGHTINGS[self.weighting](self.schedule, t).astype(np.float32)

    def token_weights(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """Those of masked tokens, see :class:`Objective`."""
        return self.masks_and_weights(sample_ids, seq_length)[1]

    def token_times(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """Diffusion time of each token, fp64, broadcastable to [batch, seq]: one for the sequence."""
        return self.times(sample_ids)[:, None]

    def times(self, sample_ids: np.ndarray) -> np.ndarray:
        """Diffusion time t of each sample, fp64 [batch]."""
        if self.is_evaluation:
            draws_a_time = 2 if self.has_exact_counts else 1
            draw, num_draws = self.draw // draws_a_time, -(-self.num_draws // draws_a_time)
            return noise.evaluation_times(sample_ids, draw=draw, num_draws=num_draws, seed=self.seed)
        t = noise.diffusion_times(
            self.seed,
            sample_ids,
            global_batch_size=self.global_batch_size,
            stratified=self.stratified,
            scheme=self.scheme,
        )
        return np.where(sample_ids < self.low_noise_samples, t * self.low_noise_ratio, t)

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> MaskedDiffusion:
        """Plain masked diffusion, from a seed of its own: the same masks whatever the training did. So runs with
        different training noise are judged by the same numbers."""
        return MaskedDiffusion(
            mask_token_id=self.mask_token_id,
            global_batch_size=self.global_batch_size,
            seed=noise.EVAL_SEED,
            valid_estimator=self.valid_estimator,
            shifted=self.shifted,
            is_evaluation=True,
            draw=draw,
            num_draws=num_draws,
        )

    @property
    def has_exact_counts(self) -> bool:
        """Whether the number of masked tokens is drawn, not a coin for each of them."""
        return self.is_evaluation and self.valid_estimator == EXACT_COUNT

    def span(self, seq_length: int) -> int:
        """Neighbouring tokens that share one time."""
        return seq_length

    def _exact_counts(self, sample_ids: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """m = 1 + ⌊t·L⌋ tokens of each span of L, the first m of a random order, weigh L / m; both [batch, seq].

        Mask by mask the expected weight is that of independent coins of probability t, integrated over t: a mask of m
        tokens has probability 1 / (L · C(L, m)), and ∫ tᵐ⁻¹ (1 − t)ᴸ⁻ᵐ dt = 1 / (m · C(L, m)). So every part of a sample
        (a document, the tokens that have a loss) keeps its expectation.

        In evaluation two draws make a pair, at t / 2 and 1 − t / 2, the second from the other end of the order: together
        they mask every token, one of each span twice. The last of an odd number of draws stands alone, at t.
        """
        batch, seq_length = t.shape
        length = self.span(seq_length)
        pair, is_second = divmod(self.draw, 2)
        if 2 * pair + 1 < self.num_draws:
            t = 1 - t / 2 if is_second else t / 2
        counts = np.minimum(1 + np.floor(t[:, ::length] * length), length).astype(np.int64)
        is_masked = np.zeros((*counts.shape, length), dtype=bool)
        for row, sample in enumerate(sample_ids.tolist()):
            random = noise.generator(self.seed + pair, noise.Purpose.NOISE, sample)
            for span, count in enumerate(counts[row]):
                order = random.permutation(length)
                is_masked[row, span, order[::-1][:count] if is_second else order[:count]] = True
        weights = is_masked * (length / counts).astype(np.float32)[..., None]
        return is_masked.reshape(batch, seq_length), weights.reshape(batch, seq_length)

    def _mask(self, sample_id: int, mask_prob: np.ndarray, seq_length: int) -> np.ndarray:
        """Which tokens of one sample are masked, bool [seq]."""
        random = noise.generator(self.seed + self.draw, noise.Purpose.NOISE, sample_id)
        coins = random.random(seq_length, dtype=np.float32)
        is_masked = (1 - coins if self.half == 2 else coins) < mask_prob
        if self.ar_ratio > 0 and random.random() < self.ar_ratio:
            first = seq_length - int(is_masked.sum())  # not a negative slice: m = 0 must mask nothing
            is_masked = np.arange(seq_length) >= first
        return is_masked

    def _cut(self, samples: Samples) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Positions and segments [batch, seq] of the first seq tokens; both begin again where a sequence is cut."""
        positions, segments = first_tokens(samples.position_ids), first_tokens(samples.segment_ids)
        seq_length = samples.tokens.shape[1] - 1
        cuts = np.array([[self._first_length(sample, seq_length)] for sample in samples.ids.tolist()])
        if (cuts == seq_length).all():
            return positions, segments
        places = np.arange(seq_length)
        is_second = places >= cuts
        own = np.broadcast_to(places, is_second.shape) if positions is None else positions
        first = np.take_along_axis(own, np.minimum(cuts, seq_length - 1), axis=1)  # position at which the cut falls
        document = np.zeros_like(is_second, dtype=np.int64) if segments is None else segments
        # Only the document that is cut begins again at 0.
        is_rest = is_second & (own - first == places - cuts)
        return np.where(is_rest, own - first, own), document + is_second

    def _first_length(self, sample_id: int, seq_length: int) -> int:
        """Length of the first part of a sample: ``seq_length``, or where it is cut."""
        if self.random_length_ratio == 0.0:
            return seq_length
        random = noise.generator(self.seed, noise.Purpose.LENGTH, sample_id)
        return int(random.integers(1, seq_length + 1)) if random.random() < self.random_length_ratio else seq_length
