"""Attention masks: their definition pair by pair, dense and in blocks."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from plain_transformer import attention
from torch.nn.attention.flex_attention import BlockMask

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model.arithmetic import keys_per_token, positions_per_token
from megatron.model.attention import RotaryEmbedding
from megatron.model.batch import Stream
from megatron.model.block import TransformerBlock
from megatron.model.mask import (
    BlockCausal,
    BlockDiffusion,
    Causal,
    Full,
    PerSample,
    RandomKeyDrop,
    WithinSegments,
)
from megatron.model.visibility import (
    TILE,
    attend_flex,
    dense_mask,
    static_rule,
    tile_occupancy,
    visible_keys,
)
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory

SAMPLE_IDS = torch.tensor([3, 8])


def segments(seq: int) -> torch.Tensor:
    """[2, seq]: the first sample is cut after 5 tokens, the second is whole."""
    return torch.stack(((torch.arange(seq) >= 5).long(), torch.zeros(seq, dtype=torch.int64)))


def stream(length: int, device: str = "cpu") -> Stream:
    kinds = torch.tensor([1, 0])
    parts = Stream(torch.zeros(2, length, 1), sample_ids=SAMPLE_IDS, segment_ids=segments(length), is_causal=kinds)
    return Stream(*(part if part is None else part.to(device) for part in parts))


def both_forms(mask, length: int, device: str = "cpu") -> tuple[torch.Tensor, BlockMask]:
    dense, blocks = (visible_keys(mask, stream(length, device), use_flex=flex) for flex in (False, True))
    assert isinstance(dense, torch.Tensor) and isinstance(blocks, BlockMask)
    return dense, blocks


def test_causal_and_full_need_no_tensor():
    for mask in (Causal(), Full()):
        assert visible_keys(mask, stream(8)) == mask
        assert visible_keys(WithinSegments(mask), Stream(torch.zeros(2, 8, 1))) == mask  # one segment a sample


def test_a_mask_per_sample_is_causal_or_full():
    seen = visible_keys(PerSample(0.5), stream(8))[:, 0]
    assert torch.equal(seen[0], torch.ones(8, 8, dtype=torch.bool).tril()) and seen[1].all()
    tiles = visible_keys(PerSample(0.5), stream(3 * TILE), use_flex=True).kv_num_blocks[:, 0]
    assert tiles.tolist() == [[1, 2, 3], [3, 3, 3]]  # a causal sample skips what it does not see
    assert keys_per_token(PerSample(0.25), 32) == 0.25 * 16 + 0.75 * 32


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_block_diffusion_pair_by_pair(size):
    """Against the paper's three parts (arXiv 2503.09573): block-diagonal, offset block-causal, block-causal."""
    seq = 6
    for mask in (BlockDiffusion(size), BlockDiffusion(size, causal=True)):
        seen = visible_keys(mask, Stream(torch.zeros(1, 2 * seq, 1)))[0, 0]
        assert keys_per_token(mask, seq) == pytest.approx(float(seen.sum()) / seq)
    seen = visible_keys(BlockDiffusion(size), Stream(torch.zeros(1, 2 * seq, 1)))[0, 0]
    for query in range(seq):
        for key in range(seq):
            own, past = query // size == key // size, key // size < query // size
            assert seen[query, key] == own  # noised → noised
            assert seen[query, seq + key] == past  # noised → clean
            assert not seen[seq + query, key]  # clean → noised: never
            assert seen[seq + query, seq + key] == (own or past)  # clean → clean


@pytest.mark.parametrize(
    "kind", [Full(), Causal(), RandomKeyDrop(0.8, seed=2), PerSample(0.5), BlockDiffusion(4)], ids=str
)
def test_segments_restrict_every_kind_pair_by_pair(kind):
    seen = visible_keys(WithinSegments(kind), stream(12))[:, 0]
    inside = visible_keys(kind, stream(12))
    if isinstance(inside, torch.Tensor):
        inside = inside[:, 0].expand(2, 12, 12)
    else:
        inside = torch.ones(2, 12, 12, dtype=torch.bool)
        inside = inside.tril() if kind == Causal() else inside
    for query in range(12):
        for key in range(12):
            assert seen[0, query, key] == (inside[0, query, key] & ((query < 5) == (key < 5)))
    assert torch.equal(seen[1], inside[1])


@pytest.mark.parametrize("kind", [Full(), Causal()], ids=str)
def test_tiles_between_documents_are_skipped(kind):
    """Documents of whole tiles, the last one shorter: a sample computes its own tiles only."""
    ids = torch.arange(4).repeat_interleave(TILE)[:-5]
    packed = Stream(torch.zeros(2, 4 * TILE - 5, 1), segment_ids=torch.stack((ids, torch.zeros_like(ids))))
    blocks = visible_keys(WithinSegments(kind), packed, use_flex=True)
    assert isinstance(blocks, BlockMask)
    assert blocks.kv_num_blocks[0, 0].tolist() == [1, 1, 1, 1]
    assert blocks.kv_num_blocks[1, 0].tolist() == ([4, 4, 4, 4] if kind == Full() else [1, 2, 3, 4])


MASKS = [
    (RandomKeyDrop(0.8, seed=2), 200),
    (RandomKeyDrop(0.8, seed=2), 2 * TILE),
    (PerSample(0.5), 200),
    (BlockDiffusion(4), 2 * 100),
    (BlockDiffusion(64), 2 * 3 * 64),  # 384: whole tiles, half of them empty
    (WithinSegments(Full()), 150),
    (WithinSegments(Causal()), 3 * TILE),
    (WithinSegments(RandomKeyDrop(0.8, seed=2)), 150),
    (WithinSegments(PerSample(0.5)), 150),
    (WithinSegments(BlockDiffusion(4)), 2 * 100),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("mask", "length"), [MASKS[0], MASKS[2], *MASKS[4:]], ids=str)
def test_blocks_and_dense_give_the_same_attention(mask, length):
    """FlexAttention in eager mode, forward only: on CPU it has no backward pass."""
    dense, blocks = both_forms(mask, length)
    query, key, value = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
    expected = attention(query, key, value, dense)
    torch.testing.assert_close(attend_flex(query, key, value, blocks), expected, rtol=1e-4, atol=1e-5)
    sdpa = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)
    torch.testing.assert_close(sdpa, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "length"), MASKS, ids=str)
def test_blocks_and_dense_give_the_same_gradients(mask, length):
    """The compiled kernel in bf16, forward and backward, against the dense mask in fp32."""
    dense, blocks = both_forms(mask, length, "cuda")
    exact = [torch.randn(2, heads, length, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, got = attention(*exact, dense), attend_flex(*rounded, blocks)
    outward = torch.randn_like(expected)
    expected.backward(outward)
    got.backward(outward.bfloat16())
    for right, ours in zip((expected, *(x.grad for x in exact)), (got, *(x.grad for x in rounded))):
        assert (ours.float() - right).norm() / right.norm() < 0.02


@pytest.mark.parametrize(("mask", "length"), [*MASKS, (BlockDiffusion(4), 448), (BlockCausal(4), 200)], ids=str)
def test_tiles_of_a_block_mask_cover_what_is_seen(mask, length):
    """The CUDA kernel skips tiles that are not listed and asks no rule in tiles that are listed as full."""
    dense, blocks = both_forms(mask, length)
    num_tiles = -(-length // TILE)
    padded = torch.zeros(dense.shape[0], num_tiles * TILE, num_tiles * TILE, dtype=torch.bool)
    padded[:, :length, :length] = dense[:, 0]
    tiles = padded.view(-1, num_tiles, TILE, num_tiles, TILE)
    some, every = tiles.any(dim=4).any(dim=2), tiles.all(dim=4).all(dim=2)
    for sample, row in product(range(len(some)), range(num_tiles)):
        own = min(sample, len(blocks.kv_indices) - 1)  # one list for all samples, or one of each
        in_part = set(blocks.kv_indices[own, 0, row, : blocks.kv_num_blocks[own, 0, row]].tolist())
        full = set(blocks.full_kv_indices[own, 0, row, : blocks.full_kv_num_blocks[own, 0, row]].tolist())
        assert not in_part & full
        assert set(some[sample, row].nonzero().flatten().tolist()) <= in_part | full
        assert all(every[sample, row, tile] for tile in full)
    if isinstance(mask, BlockDiffusion):  # a static mask lists exactly what is needed
        total = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
        assert total == int(some.sum())


def test_empty_tiles_of_block_diffusion_are_skipped():
    some, every = tile_occupancy(BlockDiffusion(TILE), 8 * TILE, torch.device("cpu"))
    assert not some.any()
    # Noised: own tile and the clean past, 1 … 4 tiles a row; clean: 1 … 4; of 64.
    assert int(every.sum()) == 10 + 10


@pytest.mark.parametrize("size", [1, 4, 32])
def test_keys_per_token_count_the_pairs(size):
    """S + B pairs per token of data, over both copies; causal is counted as S/2, not (S + 1)/2, by convention."""
    pairs = dense_mask(static_rule(BlockDiffusion(size), 64), 1, 64, torch.device("cpu")).sum().item()
    assert keys_per_token(BlockDiffusion(size), 32) == pairs / 32
    assert positions_per_token(BlockDiffusion(size)) == positions_per_token(WithinSegments(BlockDiffusion(size))) == 2
    assert keys_per_token(Causal(), 32) == 16 and keys_per_token(WithinSegments(Full()), 32) == 32


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [Causal(), RandomKeyDrop(0.8, seed=2), PerSample(0.5), WithinSegments(Causal()), BlockDiffusion(4)],
    ids=str,
)
def test_a_compiled_block_takes_block_masks_without_compiling_again(monkeypatch, mask):
    """As training on CUDA does it: the block is compiled once, every batch brings a mask of its own."""
    config = Shape.of(
        ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            seq_length=32,
            padded_vocab_size=8,
            attention_dropout=0.0,
        )
    )
    block = TransformerBlock(config, ParameterFactory(ParallelContext(), 1), rotary=RotaryEmbedding.of(config)).eval()
    hidden = torch.randn(2, 32, 32)
    positions = torch.arange(32).expand(2, 32).contiguous()
    batches = [
        Stream(hidden, positions, torch.tensor([1, 2]), segments(32), torch.tensor([1, 0])),
        Stream(
            hidden,
            positions.flip(1).contiguous(),
            torch.tensor([7, 9]),
            segments(32).flip(0).contiguous(),
            torch.tensor([0, 1]),
        ),
    ]
    visible = block.self_attention.visible
    expected = [block(batch, visible(batch, mask)).hidden for batch in batches]
    from torch._dynamo.testing import CompileCounter  # seconds to load

    counter = CompileCounter()
    torch._dynamo.reset()
    block.transform = torch.compile(block.transform, dynamic=False, backend=counter)
    forced = partial(visible_keys, use_flex=True)
    monkeypatch.setattr(
        "megatron.model.attention.visible_keys", lambda *args, use_flex, **options: forced(*args, **options)
    )
    for batch, wanted in zip(batches, expected):
        given = visible(batch, replace(mask))
        torch.testing.assert_close(block(batch, given).hidden, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
