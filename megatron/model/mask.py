"""Which keys a query may attend to: all that the model ever sees of an objective.

``Causal`` and ``Full`` need no mask tensor. Every other kind is one rule, an elementwise function of (sample, query, key)
indices, made from what travels with the batch (sample ids, positions). So every pipeline stage makes it for itself, and
the dense mask of the CPU and the block mask of the CUDA kernel (``visibility.py``) cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# (sample, query, key) → whether the query sees the key; int64 index tensors that broadcast, bool out.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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

    def rule(self, length: int, sample_ids: torch.Tensor) -> Rule:
        """Who sees whom.

        Args:
            length: queries and keys.
            sample_ids: [batch] int64, index of each sample in the training stream.
        """
        positions = torch.arange(length, device=sample_ids.device)
        offset = (self.seed * 0x9E3779B1 + 2**63) % 2**64 - 2**63  # wrapped: seeds may have 63 bits
        per_sample = hash_int64(sample_ids + offset)
        per_query = hash_int64(per_sample[:, None] + positions)  # [batch, query]
        is_chosen = uniform(hash_int64(per_query + 0x51ED27)) < self.ratio
        drop_prob = 1e-3 + (1 - 1e-3) * uniform(hash_int64(per_query + 0x2545F5))
        drop_prob = drop_prob * is_chosen  # uniform() is never below 0: not chosen drops nothing

        def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            is_kept = uniform(hash_int64(per_query[sample, query] * 31 + key)) >= drop_prob[sample, query]
            return (query == key) | ((query > key) & is_kept)

        return sees


@dataclass(frozen=True)
class BlockDiffusion:
    """Block diffusion over the concatenation [noised tokens; clean tokens] (Arriola et al., arXiv 2503.09573, §3.1 and
    appendix B.6): a noised token sees its own noised block and all clean blocks before it, a clean token sees its own
    and all earlier clean blocks. So one pass makes the predictions of every block from its clean past.

    Attributes:
        size: tokens per block.
    """

    size: int

    def rule(self, length: int) -> Rule:
        """Who sees whom among the ``length`` = 2 · seq tokens."""
        seq = length // 2

        def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            query_block, key_block = query % seq // self.size, key % seq // self.size
            from_noised, to_noised = query < seq, key < seq
            inside = (from_noised == to_noised) & (query_block == key_block)
            past = ~to_noised & (key_block < query_block)
            return inside | past

        return sees


@dataclass(frozen=True)
class Segments:
    """Bidirectional attention within parts of a sample that know nothing of each other: a part begins where the positions
    begin again at 0. A batch without positions is one part per sample."""

    def rule(self, position_ids: torch.Tensor) -> Rule:
        """Who sees whom.

        Args:
            position_ids: [batch, seq] int64.
        """
        part = (position_ids == 0).cumsum(dim=-1)

        def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return part[sample, query] == part[sample, key]

        return sees


AttentionMask = Causal | Full | RandomKeyDrop | BlockDiffusion | Segments


def keys_per_token(mask: AttentionMask, seq_length: int) -> float:
    """Mean number of (query, key) pairs that attention computes per token of data, for FLOP counts."""
    if isinstance(mask, Causal | RandomKeyDrop):  # dropped keys are computed all the same
        return seq_length / 2
    if isinstance(mask, BlockDiffusion):  # noised: own block and (S − B)/2 of the past; clean: (S + B)/2
        return float(seq_length + mask.size)
    return float(seq_length)


def positions_per_token(mask: AttentionMask) -> int:
    """Positions that the transformer computes per token of data."""
    return 2 if isinstance(mask, BlockDiffusion) else 1


def hash_int64(x: torch.Tensor) -> torch.Tensor:
    """A bijective mix of 64-bit integers (the splitmix64 finaliser, Steele et al. 2014), the same on every device."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(hashed: torch.Tensor) -> torch.Tensor:
    """Hashed integers as fp32 numbers in [0, 1), from their upper 24 bits."""
    return ((hashed >> 40) & 0xFFFFFF).to(torch.float32) / 2**24
