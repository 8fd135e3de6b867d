"""Bytes of activations, by arithmetic: what a block keeps for its backward pass, and what the head needs at once."""

from __future__ import annotations

from megatron.config.shape import Shape
from megatron.model.mask import AttentionMask, Causal, Full
from megatron.parallel.cross_entropy import CHUNK_ROWS

FLOAT = 4
TILE = 128  # of a block mask, a quarter of a byte an entry at most: index and count of each tile, twice


def kept_by_block(
    shape: Shape, *, tp_size: int, width: int, is_compiled: bool, sequence_parallel: bool = False
) -> dict[str, float]:
    """Bytes a position that one block keeps for its backward pass, by what they are.

    Every matrix product keeps its input, attention what its fused kernel needs. A compiled block recomputes the
    activation of the gate, which comes from what is kept anyway; the rest is kept by either.

    Args:
        shape: of the model.
        tp_size: tensor-parallel ranks, which share all but what enters and leaves each half of the block.
        width: bytes of an activation.
        is_compiled: whether the block runs as one graph.
        sequence_parallel: they share that too.
    """
    share = tp_size if sequence_parallel else 1
    hidden, ffn = width * shape.hidden_size / share, width * shape.ffn_hidden_size / tp_size
    head = width * shape.kv_channels / tp_size
    queries, groups = shape.num_attention_heads, shape.num_query_groups
    rotated = head * (queries + groups) if shape.use_rotary_position_embeddings else 0.0
    statistics = (FLOAT if shape.normalization == "rmsnorm" else 2 * width) / share
    silu = 0.0 if is_compiled else ffn
    return {
        "inputs of the block and of its second half": 2 * hidden,
        "normalised inputs": 2 * (hidden + statistics),
        "queries, keys, values": head * (queries + 2 * groups) + rotated,
        "attention": head * queries + FLOAT * queries / tp_size,
        "feed-forward": 3 * ffn + silu if shape.swiglu else 2 * ffn,
        "dropout masks": 2.0 * shape.hidden_size / share if shape.hidden_dropout else 0.0,
    }


def block_working_set(shape: Shape, *, tp_size: int, width: int) -> float:
    """Bytes a position of the gradients that a block's backward pass has at once: of the feed-forward layer, the widest."""
    widest = (3 if shape.swiglu else 2) * shape.ffn_hidden_size / tp_size
    return width * (widest + 2 * shape.hidden_size)


def mask_bytes(mask: AttentionMask, shape: Shape, *, samples: int, positions: int, width: int) -> float:
    """Bytes of the attention mask of a micro-batch: none for causal and full attention; a table of tiles for the block
    masks of FlexAttention; where attention has dropout, all pairs, and their copy in the dtype of the scores.

    Args:
        mask: kind of mask.
        shape: of the model.
        samples: of a micro-batch.
        positions: of a sample.
        width: bytes of an activation.
    """
    if isinstance(mask, Causal | Full):
        return 0.0
    if shape.attention_dropout > 0:
        return samples * positions**2 * (1.0 + width)
    return samples * (positions / TILE) ** 2 * 4 * FLOAT


def head_bytes(shape: Shape, *, rows: int, tp_size: int, width: int) -> int:
    """Bytes that the cross-entropy needs at once, for ``rows`` positions: one chunk of logits, over which their error is written,
    the gradient of the output matrix in fp32 and as it is handed on, the rows and their gradient."""
    chunk = min(CHUNK_ROWS["cuda"], rows)
    vocabulary = shape.padded_vocab_size // tp_size
    logits = chunk * vocabulary * width
    matrix = vocabulary * shape.hidden_size * (FLOAT + width)
    return logits + matrix + 2 * rows * shape.hidden_size * width
