"""Attention masks in the form that a kernel takes: nothing, a dense boolean tensor, or a block mask.

``Causal`` and ``Full`` need no tensor. Every other kind is one rule, an elementwise function of (sample, query, key)
indices, made from what travels with the batch. So every pipeline stage makes it for itself, and the dense mask of the CPU
and the block mask of the CUDA kernel cannot disagree.

On CUDA the rule is compiled into PyTorch's FlexAttention kernel, which skips blocks of 128 x 128 scores that no query needs
and makes no [seq, seq] tensor. Elsewhere, and where attention has dropout (FlexAttention has none), scaled dot-product
attention takes the dense mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron.model.batch import Stream
from megatron.model.mask import (
    AttentionMask,
    BlockCausal,
    BlockDiffusion,
    Causal,
    Full,
    PerSample,
    RandomKeyDrop,
    WithinSegments,
)

TILE = 128
# What attention is given: a mask kind that needs no tensor, or the mask itself.
Visible = Causal | Full | torch.Tensor | BlockMask
# (sample, query, key) → whether the query sees the key; int64 index tensors that broadcast, bool out.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def visible_keys(mask: AttentionMask, stream: Stream, *, use_flex: bool = False, past: int = 0) -> Visible:
    """The mask of one batch.

    Args:
        mask: kind of mask.
        stream: gives sizes and device, and the sample and segment ids of masks that need them.
        use_flex: make a block mask instead of a dense one.
        past: tokens in the cache, which the stream continues; the keys are these and its own.

    Returns:
        ``Causal`` or ``Full``; or a bool tensor [batch or 1, 1, query, key], True where a query sees a key; or a
        ``BlockMask``.
    """
    if isinstance(mask, WithinSegments) and stream.segment_ids is None:
        mask = mask.kind
    if isinstance(mask, Full) or (isinstance(mask, Causal) and (not past or stream.hidden.shape[1] == 1)):
        return mask  # one new token sees all that are there
    batch, length = stream.hidden.shape[:2]
    if past:
        return dense_mask(rule_of(mask, stream), 1, length, stream.hidden.device, past=past)
    if isinstance(mask, BlockCausal | BlockDiffusion):
        return _static(mask, length, stream.hidden.device, use_flex)
    rule = rule_of(mask, stream)
    if not use_flex:
        return dense_mask(rule, batch, length, stream.hidden.device)
    tiles = _possible_tiles(mask, stream)
    return _block_mask(rule, length, some=tiles, every=torch.zeros_like(tiles))


def rule_of(mask: AttentionMask, stream: Stream) -> Rule:
    """Who sees whom in one batch."""
    if isinstance(mask, WithinSegments):
        return _segment_rule(mask, stream)
    if isinstance(mask, RandomKeyDrop):
        return _key_drop_rule(mask, stream)
    if isinstance(mask, BlockCausal | BlockDiffusion):
        return static_rule(mask, stream.hidden.shape[1])
    if isinstance(mask, PerSample):
        sees_all = _sees_all(stream)
        return lambda sample, query, key: (query >= key) | sees_all[sample]
    is_causal = isinstance(mask, Causal)
    return lambda sample, query, key: query >= key if is_causal else (query >= 0) & (key >= 0)


def _sees_all(stream: Stream) -> torch.Tensor:
    """Which samples have full attention, bool [batch]."""
    assert stream.is_causal is not None, "a mask per sample needs the kind of every sample"
    return stream.is_causal == 0


def _segment_rule(mask: WithinSegments, stream: Stream) -> Rule:
    inside, segments = rule_of(mask.kind, stream), stream.segment_ids
    assert segments is not None

    def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (segments[sample, query] == segments[sample, key]) & inside(sample, query, key)

    return sees


def _key_drop_rule(mask: RandomKeyDrop, stream: Stream) -> Rule:
    assert stream.sample_ids is not None, f"{mask} needs the sample ids"
    positions = torch.arange(stream.hidden.shape[1], device=stream.sample_ids.device)
    offset = (mask.seed * 0x9E3779B1 + 2**63) % 2**64 - 2**63  # wrapped: seeds may have 63 bits
    per_sample = hash_int64(stream.sample_ids + offset)
    per_query = hash_int64(per_sample[:, None] + positions)  # [batch, query]
    is_chosen = uniform(hash_int64(per_query + 0x51ED27)) < mask.ratio
    drop_prob = 1e-3 + (1 - 1e-3) * uniform(hash_int64(per_query + 0x2545F5))
    drop_prob = drop_prob * is_chosen  # uniform() is never below 0: not chosen drops nothing

    def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_kept = uniform(hash_int64(per_query[sample, query] * 31 + key)) >= drop_prob[sample, query]
        return (query == key) | ((query > key) & is_kept)

    return sees


def static_rule(mask: BlockCausal | BlockDiffusion, length: int) -> Rule:
    """Who sees whom; the same in every sample. Of block diffusion, ``length`` = 2 · seq tokens are [noised; clean]."""
    if isinstance(mask, BlockCausal):
        return lambda sample, query, key: key // mask.size <= query // mask.size
    seq = length // 2

    def sees(sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query_block, key_block = query % seq // mask.size, key % seq // mask.size
        from_noised, to_noised = query < seq, key < seq
        inside = (from_noised == to_noised) & (query_block == key_block)
        if mask.causal:
            inside = inside & (from_noised | (key <= query))
        past = ~to_noised & (key_block < query_block)
        return inside | past

    return sees


def dense_mask(rule: Rule, batch: int, length: int, device: torch.device, *, past: int = 0) -> torch.Tensor:
    """The rule for all pairs, bool [batch, 1, length, past + length]; the queries are the last ``length`` of the keys."""
    samples, keys = torch.arange(batch, device=device), torch.arange(past + length, device=device)
    return rule(samples[:, None, None], keys[past:, None], keys).expand(batch, length, past + length).unsqueeze(1)


def attend_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Attention under a block mask: [batch, heads, seq, channels] in and out; keys may have fewer heads."""
    # Inside a compiled block the kernel is compiled with it; without a compiler on CPU it is plain torch.
    is_direct = torch.compiler.is_compiling() or not query.is_cuda
    kernel = flex_attention if is_direct else _compiled_flex()
    return kernel(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])  # type: ignore[return-value]


@cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _static(
    mask: BlockCausal | BlockDiffusion, length: int, device: torch.device, use_flex: bool
) -> torch.Tensor | BlockMask:
    """A mask that is the same for every batch is made once."""
    rule = static_rule(mask, length)
    if not use_flex:
        return dense_mask(rule, 1, length, device)
    some, every = tile_occupancy(mask, length, device)
    return _block_mask(rule, length, some=some[None], every=every[None])


def _possible_tiles(mask: AttentionMask, stream: Stream) -> torch.Tensor:
    """Tiles of 128 x 128 pairs in which a query may see a key, bool [batch or 1, tiles, tiles].

    Not the least set: to find that out, all pairs would be computed. Segments are compared by their range in a tile.
    """
    length, device = stream.hidden.shape[1], stream.hidden.device
    num_tiles = -(-length // TILE)
    if isinstance(mask, WithinSegments):
        assert stream.segment_ids is not None
        ids = stream.segment_ids.float()[:, None]  # exact below 2^24 segments; the last tile is filled with its last id
        ids = F.pad(ids, (0, num_tiles * TILE - length), mode="replicate").view(-1, num_tiles, TILE)
        low, high = ids.amin(dim=-1), ids.amax(dim=-1)
        overlaps = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
        return overlaps & _possible_tiles(mask.kind, stream)
    if isinstance(mask, BlockCausal | BlockDiffusion):
        some, every = tile_occupancy(mask, length, device)
        return (some | every)[None]
    tiles = torch.ones(1, num_tiles, num_tiles, dtype=torch.bool, device=device)
    if isinstance(mask, PerSample):
        return tiles.tril() | _sees_all(stream)[:, None, None]
    return tiles if isinstance(mask, Full) else tiles.tril()


@lru_cache(maxsize=8)
def tile_occupancy(
    mask: BlockCausal | BlockDiffusion, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of 128 x 128 pairs are seen in part and which in full, both bool [tiles, tiles].

    One row of tiles at a time, so that no [length, length] tensor is made.
    """
    rule, num_tiles = static_rule(mask, length), -(-length // TILE)
    zero, keys = torch.zeros((), dtype=torch.int64, device=device), torch.arange(num_tiles * TILE, device=device)
    seen = torch.zeros(num_tiles, num_tiles, dtype=torch.int64, device=device)
    for row in range(num_tiles):
        queries = torch.arange(row * TILE, row * TILE + TILE, device=device)[:, None]
        sees = rule(zero, queries, keys) & (keys < length) & (queries < length)
        seen[row] = sees.view(TILE, num_tiles, TILE).sum(dim=(0, 2))
    return (seen > 0) & (seen < TILE * TILE), seen == TILE * TILE


def _block_mask(rule: Rule, length: int, *, some: torch.Tensor, every: torch.Tensor) -> BlockMask:
    """A block mask from the tiles that are seen in part and in full, both bool [batch or 1, tiles, tiles]."""

    def mask_mod(sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return rule(sample, query, key)

    some_count, some_first = _counts_and_order(some)
    every_count, every_first = _counts_and_order(every)
    return BlockMask.from_kv_blocks(
        some_count,
        some_first,
        every_count,
        every_first,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _counts_and_order(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Occupied tiles of each row: their number [batch, 1, rows], and their columns before all others [batch, 1, rows,
    columns]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1).int()[:, None], order.int()[:, None].contiguous()


def hash_int64(x: torch.Tensor) -> torch.Tensor:
    """A bijective mix of 64-bit integers (the splitmix64 finaliser, Steele et al. 2014), the same on every device."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(hashed: torch.Tensor) -> torch.Tensor:
    """Hashed integers as fp32 numbers in [0, 1), from their upper 24 bits."""
    return ((hashed >> 40) & 0xFFFFFF).to(torch.float32) / 2**24
