"""Which keys a query may attend to: all that the model ever sees of an objective.

``Causal`` and ``Full`` need no mask tensor. A mask that differs between samples is a pure function of the sample ids,
so every pipeline stage makes it for itself and nothing but the ids travels between stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def allowed(self, sample_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
        """Boolean mask [batch, 1, query, key], True where attention is allowed.

        Args:
            sample_ids: [batch] int64, index of each sample in the training stream.
            seq_length: length of queries and keys.
        """
        positions = torch.arange(seq_length, device=sample_ids.device)
        offset = (self.seed * 0x9E3779B1 + 2**63) % 2**64 - 2**63  # wrapped: seeds may have 63 bits
        per_sample = hash_int64(sample_ids + offset)
        per_query = hash_int64(per_sample[:, None] + positions)  # [batch, query]
        is_chosen = uniform(hash_int64(per_query + 0x51ED27)) < self.ratio
        drop_prob = 1e-3 + (1 - 1e-3) * uniform(hash_int64(per_query + 0x2545F5))
        per_key = uniform(hash_int64(per_query[:, :, None] * 31 + positions))  # [batch, query, key]
        is_dropped = is_chosen[:, :, None] & (per_key < drop_prob[:, :, None])
        earlier = positions[:, None] > positions
        itself = positions[:, None] == positions
        return (itself | (earlier & ~is_dropped)).unsqueeze(1)


AttentionMask = Causal | Full | RandomKeyDrop


def hash_int64(x: torch.Tensor) -> torch.Tensor:
    """A bijective mix of 64-bit integers (the splitmix64 finaliser, Steele et al. 2014), the same on every device."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(hashed: torch.Tensor) -> torch.Tensor:
    """Hashed integers as fp32 numbers in [0, 1), from their upper 24 bits."""
    return ((hashed >> 40) & 0xFFFFFF).to(torch.float32) / 2**24


def needs_sample_ids(mask: AttentionMask) -> bool:
    """Whether the mask differs between samples, so that sample ids must reach every block."""
    return isinstance(mask, RandomKeyDrop)
