"""Parameters, FLOPs and device peaks: what a model costs, counted as the paper and the data sheets count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.shape import Shape
from megatron.model.mask import AttentionMask, BlockDiffusion, Causal, PerSample, RandomKeyDrop, WithinSegments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        names: what ``torch.cuda.get_device_name()`` calls it.
        peak: dense bf16 FLOP/s, by the vendor's data sheet (half of what it gives with sparsity).
        memory_mib: all of it, as the driver counts (nvidia-smi).
        bandwidth: of this memory in bytes/s, by the data sheet.
        link: to a neighbour in the node, bytes/s in one direction: NVLink, or PCIe where there is none.
    """

    names: tuple[str, ...]
    peak: float
    memory_mib: int
    bandwidth: float
    link: float


def _devices(table: str) -> Iterator[tuple[str, Device]]:
    for name, names, peak, memory, bandwidth, link in (row.split(",") for row in table.splitlines()[1:]):
        yield name, Device(tuple(names.split("|")), float(peak), int(memory), float(bandwidth), float(link))


DEVICES = dict(_devices(Path(__file__).with_name("devices.csv").read_text(encoding="utf-8")))


def parameters_for_compute(model: Shape, vocab_size: int) -> int:
    """N of C = 6·N·D, as the paper counts it: ``4·L·h² + 3·L·h·ffn + 6·L·h + V·h``, V being the vocabulary, not padded. In
    other models, with G groups of keys and values for H heads 4 is 2 + 2·G/H, and with GELU, which has no gate, 3 is 2."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    attention = 2 * hidden**2 * (heads + model.num_query_groups) // heads
    feed_forward = (3 if model.swiglu else 2) * hidden * model.ffn_hidden_size
    return model.num_layers * (attention + feed_forward + 6 * hidden) + vocab_size * hidden


def total_parameters(model: Shape) -> dict[str, int]:
    """``total`` parameters as trained, padding rows included, and those of the ``embedding`` among them."""
    from megatron.model.gpt import GPTModel
    from megatron.parallel.tensor import ParameterFactory

    parameters = GPTModel(model, ParameterFactory.of_shapes()).parameters()
    embedding = model.padded_vocab_size * model.hidden_size
    return {"total": sum(p.numel() for p in parameters), "embedding": embedding}


def model_flops_per_token(model: Shape, *, mask: AttentionMask, loss_fraction: float, num_views: int = 1) -> float:
    """FLOPs of forward and backward per token, for TFLOP/s and MFU.

    ``6 · (matrix parameters of the blocks · c + V_padded · h · loss_fraction) + 12 · L · heads · kv · keys``: every matrix
    product counts 2 in the forward and 4 in the backward pass; ``keys`` are those that a token attends to (S for
    bidirectional, S/2 for causal attention); c is 1, or 2 for block diffusion, which computes a noised and a clean copy
    (keys S + B); the head counts only for positions in the loss. Recomputation is not counted.

    Args:
        model: resolved model configuration.
        mask: which keys a query sees.
        loss_fraction: expected share of positions in the loss, of all views together.
        num_views: rows that are computed for every sample.
    """
    heads_size = model.num_attention_heads * model.kv_channels
    projections = model.hidden_size * model.kv_channels * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    feed_forward = (3 if model.swiglu else 2) * model.hidden_size * model.ffn_hidden_size
    head = model.padded_vocab_size * model.hidden_size * loss_fraction
    blocks = model.num_layers * (projections + feed_forward) * positions_per_token(mask)
    attention = 12 * model.num_layers * heads_size * keys_per_token(mask, model.seq_length)
    return 6 * (num_views * blocks + head) + num_views * attention


def keys_per_token(mask: AttentionMask, seq_length: int) -> float:
    """Mean number of (query, key) pairs that attention computes per token of data, for FLOP counts.

    Segments are not counted: documents have all lengths, and a dense mask computes all pairs.
    """
    if isinstance(mask, WithinSegments):
        return keys_per_token(mask.kind, seq_length)
    if isinstance(mask, Causal | RandomKeyDrop):  # dropped keys are computed all the same
        return seq_length / 2
    if isinstance(mask, PerSample):
        return seq_length * (1 - mask.causal_share / 2)
    if isinstance(mask, BlockDiffusion):  # noised: own block and (S − B)/2 of the past; clean: (S + own block)/2
        return seq_length + (mask.size + mask.clean.size) / 2
    return float(seq_length)


def positions_per_token(mask: AttentionMask) -> int:
    """Positions that the transformer computes per token of data."""
    kind = mask.kind if isinstance(mask, WithinSegments) else mask
    return 2 if isinstance(kind, BlockDiffusion) else 1


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of the device, or None where no data sheet applies (CPU, unlisted GPU)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((known.peak for known in DEVICES.values() if name in known.names), None)
