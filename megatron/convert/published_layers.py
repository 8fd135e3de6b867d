"""Layer files of the published DeepSpeed-pipeline layout: their grid of layers and ranks, and the joining of the ranks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError, require
from megatron.parallel.sharding import ShardSpec

LAYER_FILE = re.compile(r"layer_([0-9]+)-model_([0-9]+)-model_states\.pt")
FIRST_RANK = "mp_rank_00_model_states.pt"


def list_files(folder: Path) -> tuple[dict[int, list[Path]], int]:
    """List the layer files of a checkpoint.

    Returns:
        Layer -> its files in rank order, and the tensor-parallel size; the grid has no hole.

    Raises:
        UserError: a file is missing, or has another name.
    """
    keys: dict[tuple[int, int], Path] = {}
    for file in folder.glob("layer_*"):
        match = LAYER_FILE.fullmatch(file.name)
        key = (int(match[1]), int(match[2])) if match else (0, 0)
        if key[0] < 1 or file.name != _layer_file(*key):
            raise UserError(
                f"{folder} holds {file.name}",
                (
                    "every layer file must be called layer_KK-model_TT-model_states.pt, because every tensor "
                    "must be accounted for"
                ),
                "move the file away if it does not belong to the model",
            )
        keys[key] = file
    last = max((layer for layer, _ in keys), default=1)
    tp_size = 1 + max((rank for _, rank in keys), default=0)
    # A name can claim any number of layers: the first holes are enough.
    holes = (
        _layer_file(layer, rank) for layer in range(1, last + 1) for rank in range(tp_size) if (layer, rank) not in keys
    )
    missing = list(itertools.islice(holes, 8))
    if not (folder / FIRST_RANK).is_file():
        missing.append(FIRST_RANK)
    if missing:
        raise UserError(
            f"{folder} is incomplete: missing {', '.join(missing)}",
            f"layers 1 to {last} at tensor-parallel size {tp_size} need every file",
            "download or copy the checkpoint again",
        )
    return {layer: [keys[layer, rank] for rank in range(tp_size)] for layer in range(1, last + 1)}, tp_size


def _layer_file(layer: int, rank: int) -> str:
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def join_layers(
    layers: Mapping[int, list[dict[str, Tensor]]], specs: Mapping[str, ShardSpec], folder: Path
) -> dict[str, Tensor]:
    """Join the ranks of every tensor and give it its canonical name.

    Args:
        layers: layer -> what the file of each rank holds.
        specs: how the model splits its tensors, by canonical name; an unknown name passes, for the caller to refuse.
        folder: where the files are, for messages.

    Raises:
        UserError: ranks disagree, or hold something else than tensors of the model's shapes.
    """
    tensors: dict[str, Tensor] = {}
    norm = len(layers) - (1 if "lm_head.weight" in specs else 0)  # the layer of the last norm
    for layer, ranks in layers.items():
        where = f"{folder.name}/layer_{layer:02d}"
        require(
            all(isinstance(rank, dict) and all(isinstance(name, str) for name in rank) for rank in ranks),
            f"{where} holds no table of tensors by name",
            "a layer file holds only tensors",
            "this checkpoint comes from another code and is not converted",
        )
        names = list(ranks[0])
        if any(set(rank) != set(names) for rank in ranks):
            raise UserError(
                f"{where}: the tensor-parallel ranks hold different tensors",
                "every rank must hold its part of each",
                "download or copy the checkpoint again",
            )
        prefix = "" if layer in (1, norm + 1) else "final_layernorm." if layer == norm else f"layers.{layer - 2}."
        for name in names:
            parts = [rank[name] for rank in ranks]
            _check_parts(parts, f"{where}: {name}")
            tensors[prefix + name] = _join(parts, specs.get(prefix + name), f"{where}: {name}")
    return tensors


def _check_parts(parts: list[Any], what: str) -> None:
    """Refuse what is no tensor, claims more elements than its file holds, or differs in shape between ranks."""
    for part in parts:
        require(
            isinstance(part, Tensor),
            f"{what} is a {type(part).__name__}",
            "a layer file holds only tensors",
            "this checkpoint comes from another code and is not converted",
        )
        require(
            part.numel() * part.element_size() <= part.untyped_storage().nbytes(),
            f"{what} claims {list(part.shape)} in {part.untyped_storage().nbytes()} bytes",
            "a file holds all elements of its tensors",
            "this file is damaged or was made to exhaust the memory",
        )
    require(
        all(part.shape == parts[0].shape and part.dtype == parts[0].dtype for part in parts),
        f"{what} is {[list(part.shape) for part in parts]} on the ranks",
        "tensor-parallel ranks hold equal parts",
        "the folder mixes files of two models",
    )


def _join(parts: list[Tensor], spec: ShardSpec | None, what: str) -> Tensor:
    """Make the full tensor from the parts of all ranks, as the model splits it."""
    if spec is None or len(parts) == 1:
        return parts[0]
    if spec.dim is None:
        require(
            all(torch.equal(part, parts[0]) for part in parts),
            f"{what} differs between tensor-parallel ranks",
            "a replicated tensor must be the same on all",
            "the files come from different steps, or the run had drifted",
        )
        return parts[0]
    expected = spec.local_shape(len(parts))
    require(
        tuple(parts[0].shape) == expected,
        f"{what} is {list(parts[0].shape)} on each of {len(parts)} ranks, expected {list(expected)}",
        "every rank holds an equal share of the model in args",
        "the folder mixes files of two models",
    )
    return spec.combine(parts)
