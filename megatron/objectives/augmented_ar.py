"""Autoregressive modelling with augmented samples (arXiv 2606.16246): random tokens, right to left, targets further ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from megatron import randomness as noise
from megatron.config.option import PROBABILITY, Range, option
from megatron.errors import require
from megatron.model.batch import Inputs, ModelBatch, Samples, build_batch, places_in_documents
from megatron.objectives.ar import Autoregressive
from megatron.objectives.base import BOUND, NO_BOUND, Setting
from megatron.objectives.vocabulary import VocabularyOptions


@dataclass(frozen=True)
class AugmentedOptions(VocabularyOptions):
    """Flags of augmented AR; each augmentation can be off."""

    # fmt: off
    random_token_ratio: float = option(0.05, "share of the inputs that are replaced by random tokens; 0: off", unit="RATIO",
        range=PROBABILITY)
    reverse_ratio: float = option(0.5, "probability that a sample is read from right to left, after a token that says so; "
        "0: off", unit="P", range=PROBABILITY)
    max_target_offset: int = option(5, "a sample predicts its tokens 1 to this many places ahead, after a token that says how "
        "many (1: none), each e times rarer than the one before; 1: off", unit="PLACES", range=Range(at_least=1, at_most=64))
    # fmt: on


class View(NamedTuple):
    """How one sample is read.

    Attributes:
        is_reversed: from right to left.
        offset: places from an input to its label.
    """

    is_reversed: bool
    offset: int


@dataclass(frozen=True, kw_only=True)
class AugmentedAR(Autoregressive):
    """Next-token prediction of samples that are read in other ways, ``loss = Σ ce(s_{j+i} | noised s_≤j) / (batch · seq)``.

    A sample draws its direction and its offset i, with probability ∝ e^−(i−1); then each input token is replaced by a
    uniformly random one with the probability of the flag. s is the sample, or the sample reversed, behind a token that
    says "reversed" and one that says the offset. Both are left out where there is nothing to say: what is read from left
    to right one token ahead, as in evaluation and generation, is plain AR. These tokens have rows of their own: that of the
    mask token and those behind it. They are no labels and are not replaced.

    A sample that is reversed predicts the same seq tokens as AR, without being given its first one. What a target further
    ahead would need and a sample does not hold, or another document does where attention stays within documents, is left out.

    Under a given direction and given noise the loss at offset 1 is a likelihood; averaged over them it bounds that of the
    mixture. With other offsets it is none.

    Attributes:
        direction_token_id: row of the token that says "reversed"; offset i from 2 on has the row i − 1 after it.
        vocab_size: tokens that replacements are drawn from.
        random_ratio: share of replaced inputs.
        reverse_ratio: share of reversed samples.
        max_offset: largest i.
        seed: seed of the noise.
    """

    direction_token_id: int
    vocab_size: int
    random_ratio: float
    reverse_ratio: float
    max_offset: int
    seed: int
    needs_mask_token: ClassVar[bool] = True

    Options: ClassVar[type] = AugmentedOptions

    @classmethod
    def build(cls, options: object, setting: Setting) -> AugmentedAR:
        """See :class:`Objective`."""
        assert isinstance(options, AugmentedOptions) and setting.mask_token_id is not None
        require(
            options.random_token_ratio > 0 or options.reverse_ratio > 0 or options.max_target_offset > 1,
            "--objective augmented_ar with every augmentation off",
            "it would be plain AR",
            "pass --random-token-ratio, --reverse-ratio or --max-target-offset, or --objective ar",
        )
        size, last = options.noise_vocab_size or 0, setting.mask_token_id + options.max_target_offset
        require(
            0 < size <= setting.mask_token_id,
            f"noise of {size} tokens with a direction token in row {setting.mask_token_id}",
            "the rows of direction and offsets lie behind the tokens that noise is drawn from",
            "leave out --noise-vocab-size and --mask-token-id",
        )
        require(
            last <= (setting.padded_vocab_size or last),
            f"--max-target-offset {options.max_target_offset} with {setting.padded_vocab_size} rows of the vocabulary",
            f"the tokens that say direction and offset have the rows {setting.mask_token_id} to {last - 1}",
            f"pass --padded-vocab-size {-(-last // 128) * 128}, or a smaller offset",
        )
        return cls(
            direction_token_id=setting.mask_token_id,
            vocab_size=size,
            random_ratio=options.random_token_ratio,
            reverse_ratio=options.reverse_ratio,
            max_offset=options.max_target_offset,
            seed=setting.seed,
            label=BOUND if options.max_target_offset == 1 else NO_BOUND,
        )

    def view(self, random: np.random.Generator) -> View:
        """How a sample is read, from its first two random numbers."""
        direction, place = random.random(2)
        shares = np.exp(-np.arange(self.max_offset))
        offset = 1 + int(np.searchsorted(np.cumsum(shares[:-1]) / shares.sum(), place, side="right"))
        return View(bool(direction < self.reverse_ratio), offset)

    def says(self, view: View) -> list[int]:
        """The tokens before a sample that is read so."""
        offset = [self.direction_token_id + view.offset - 1] if view.offset > 1 else []
        return [self.direction_token_id] * view.is_reversed + offset

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Inputs are the first seq tokens of each sample as it is read, labels what stands its offset ahead."""
        rows = [self._row(samples, row) for row in range(len(samples.ids))]
        ids, labels, weights, has_loss, positions, segments = (
            None if column[0] is None else np.stack(column) for column in zip(*rows)
        )
        assert ids is not None and labels is not None and weights is not None
        return build_batch(
            Inputs(ids, positions, samples.ids, segments), labels=labels, loss_weights=weights, has_loss=has_loss
        )

    def _row(self, samples: Samples, row: int) -> tuple[np.ndarray | None, ...]:
        """Input ids, labels, weights, where a loss is allowed, positions and segments of one sample, [seq] each."""
        tokens = samples.tokens[row]
        random = noise.generator(self.seed, noise.Purpose.NOISE, int(samples.ids[row]))
        view = self.view(random)
        said, seq = self.says(view), len(tokens) - 1
        order = np.arange(seq, -1, -1) if view.is_reversed else np.arange(seq + 1)
        order = np.append(np.repeat(order[0], len(said)), order)  # what is said belongs to the first document
        loss_mask, segments, positions = (
            None if part is None else part[row]
            for part in (samples.loss_mask, samples.segment_ids, samples.position_ids)
        )
        read = tokens[order]
        shown = np.where(
            random.random(len(read)) < self.random_ratio, random.integers(self.vocab_size, size=len(read)), read
        )
        shown[: len(said)] = said
        places = np.arange(seq)
        targets = np.minimum(places + view.offset, len(read) - 1)
        has_label = (places + view.offset < len(read)) & (places + 1 >= len(said))
        if segments is not None and view.offset > 1:
            has_label &= segments[order[places]] == segments[order[targets]]
        # A pair of neighbours without a loss has none in either direction; it is named by its left one.
        left = order[places + view.is_reversed]
        return (
            shown[:seq],
            read[targets],
            has_label.astype(np.float32),
            None if loss_mask is None else loss_mask[left],
            None if positions is None else (positions if not said else _places(positions, order))[:seq],
            None if segments is None else segments[order[:seq]],
        )

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Autoregressive:
        """Plain AR: left to right, the next token, and nothing said before it."""
        return Autoregressive()


def _places(positions: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions of tokens in their documents as they are read, int64 [read].

    Args:
        positions: [seq + 1] of the tokens as they stand.
        order: [read] which token is read when.
    """
    documents = np.cumsum(np.diff(positions, prepend=positions[0] - 1) != 1)
    return places_in_documents(documents[order][None])[0]
