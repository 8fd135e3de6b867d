"""Kinds of attention mask: which keys a query may attend to, which is all that the model ever sees of an objective.

Plain data, without torch; the rules that make masks of them are in ``visibility.py``, beside the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Causal:
    """A query attends to itself and to earlier positions."""


@dataclass(frozen=True)
class Full:
    """Every query attends to every key (bidirectional)."""


@dataclass(frozen=True)
class RandomKeyDrop:
    """Causal attention with keys dropped at random (the attention-masking ablation of arXiv 2507.15857).

    Each query is chosen with probability ``ratio``; a chosen query i drops each earlier key with its own probability
    q_i ~ U(1e-3, 1). A token always sees itself.

    Attributes:
        ratio: probability that a query is chosen.
        seed: seed of the drops; they are a function of (seed, sample id, query, key).
    """

    ratio: float
    seed: int


@dataclass(frozen=True)
class PerSample:
    """Causal attention in the samples that say so (``Inputs.is_causal``), full attention in the others.

    Attributes:
        causal_share: of the samples, expected (for FLOP counts).
    """

    causal_share: float


@dataclass(frozen=True)
class BlockCausal:
    """A query sees its own block and all earlier ones: finished tokens of block diffusion. Blocks of one token are causal.

    Attributes:
        size: tokens per block.
    """

    size: int


@dataclass(frozen=True)
class BlockDiffusion:
    """Block diffusion over the concatenation [noised tokens; clean tokens] (Arriola et al., arXiv 2503.09573, §3.1 and
    appendix B.6): a noised token sees its own noised block and all clean blocks before it, a clean token sees its own
    and all earlier clean blocks. So one pass makes the predictions of every block from its clean past.

    Attributes:
        size: tokens per block.
        causal: a clean token sees nothing behind itself, not even in its own block.
    """

    size: int
    causal: bool = False

    @property
    def clean(self) -> BlockCausal:
        """Who sees whom among clean tokens."""
        return BlockCausal(1 if self.causal else self.size)


@dataclass(frozen=True)
class WithinSegments:
    """Attention of another kind that never leaves the segment of the query (a document of a packed sample, a part of a cut
    one). A batch without segment ids is one segment per sample.

    Attributes:
        kind: who sees whom within a segment.
    """

    kind: Causal | Full | RandomKeyDrop | PerSample | BlockCausal | BlockDiffusion


AttentionMask = Causal | Full | RandomKeyDrop | PerSample | BlockCausal | BlockDiffusion | WithinSegments


def within_segments(mask: AttentionMask) -> WithinSegments:
    """The same kind of attention, restricted to segments."""
    return mask if isinstance(mask, WithinSegments) else WithinSegments(mask)


def made_of(mask: AttentionMask) -> tuple[str, ...]:
    """What a mask is made of, of that which travels with each sample: names of fields of a ``Stream``, in their order there."""
    if isinstance(mask, WithinSegments):
        names = {"segment_ids", *made_of(mask.kind)}
        return tuple(name for name in ("sample_ids", "segment_ids", "is_causal") if name in names)
    return ("sample_ids",) * isinstance(mask, RandomKeyDrop) + ("is_causal",) * isinstance(mask, PerSample)
