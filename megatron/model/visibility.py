"""Attention masks in the form that a kernel takes: nothing, a dense boolean tensor, or a block mask.

On CUDA the rule of a mask is compiled into PyTorch's FlexAttention kernel, which skips blocks of 128 x 128 scores that no
query needs and makes no [seq, seq] tensor. Elsewhere, and where attention has dropout (FlexAttention has none), scaled
dot-product attention takes the dense mask.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron.model.mask import AttentionMask, BlockDiffusion, Causal, Full, RandomKeyDrop, Rule, Segments

TILE = 128
# What attention is given: a mask kind that needs no tensor, or the mask itself.
Visible = Causal | Full | torch.Tensor | BlockMask


def visible_keys(
    mask: AttentionMask,
    hidden: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    use_flex: bool = False,
) -> Visible:
    """The mask of one batch.

    Args:
        mask: kind of mask.
        hidden: [batch, seq, ...]: gives sizes and device.
        position_ids: [batch, seq], for masks of segments; without them a sample is one segment.
        sample_ids: [batch], for masks that differ between samples.
        use_flex: make a block mask instead of a dense one.

    Returns:
        ``Causal`` or ``Full``; or a bool tensor [batch or 1, 1, query, key], True where a query sees a key; or a
        ``BlockMask``.
    """
    batch, length = hidden.shape[:2]
    if isinstance(mask, Causal | Full):
        return mask
    if isinstance(mask, BlockDiffusion):
        return _static(mask, length, hidden.device, use_flex)
    if isinstance(mask, Segments):
        if position_ids is None:
            return Full()
        rule = mask.rule(position_ids)
    else:
        assert isinstance(mask, RandomKeyDrop) and sample_ids is not None, f"{mask} needs the sample ids"
        rule = mask.rule(length, sample_ids)
    if not use_flex:
        return dense_mask(rule, batch, length, hidden.device)
    # Which tiles are empty depends on the batch; to find out would cost more than to compute them.
    tiles = torch.ones(-(-length // TILE), -(-length // TILE), dtype=torch.bool, device=hidden.device)
    tiles = tiles.tril() if isinstance(mask, RandomKeyDrop) else tiles
    return _block_mask(rule, length, some=tiles, every=torch.zeros_like(tiles))


def dense_mask(rule: Rule, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The rule for all pairs, bool [batch, 1, length, length]."""
    samples, positions = torch.arange(batch, device=device), torch.arange(length, device=device)
    return rule(samples[:, None, None], positions[:, None], positions).expand(batch, length, length).unsqueeze(1)


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
def _static(mask: BlockDiffusion, length: int, device: torch.device, use_flex: bool) -> torch.Tensor | BlockMask:
    """A mask that is the same for every batch is made once."""
    rule = mask.rule(length)
    if not use_flex:
        return dense_mask(rule, 1, length, device)
    some, every = tile_occupancy(rule, length, device)
    return _block_mask(rule, length, some=some, every=every)


def tile_occupancy(rule: Rule, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles of 128 x 128 pairs are seen in part and which in full, both bool [tiles, tiles].

    One row of tiles at a time, so that no [length, length] tensor is made.
    """
    num_tiles = -(-length // TILE)
    zero, keys = torch.zeros((), dtype=torch.int64, device=device), torch.arange(num_tiles * TILE, device=device)
    seen = torch.zeros(num_tiles, num_tiles, dtype=torch.int64, device=device)
    for row in range(num_tiles):
        queries = torch.arange(row * TILE, row * TILE + TILE, device=device)[:, None]
        sees = rule(zero, queries, keys) & (keys < length) & (queries < length)
        seen[row] = sees.view(TILE, num_tiles, TILE).sum(dim=(0, 2))
    return (seen > 0) & (seen < TILE * TILE), seen == TILE * TILE


def _block_mask(rule: Rule, length: int, *, some: torch.Tensor, every: torch.Tensor) -> BlockMask:
    """A block mask from the tiles that are seen in part and in full."""

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
    """Occupied tiles of each row: their number [1, 1, rows], and their columns before all others [1, 1, rows, columns]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1).int()[None, None], order.int()[None, None].contiguous()
