"""The canonical tensors of a model: their names, shapes and splits, taken from the model itself; and a checkpoint made of
whole ones (conversions end here)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.writer import Saving
from megatron.config.schema import WEIGHT, Config, ModelConfig
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.model.gpt import GPTModel
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.parallel.tensor import ParameterFactory

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
         "seq_length", "max_position_embeddings", "padded_vocab_size")  # fmt: skip
LARGEST_SIZE = 1 << 24  # of one dimension; far above any model, and products of two stay far below 2**63 bytes


def model_tensors(model: ModelConfig, *, num_tensors: int, source: str) -> dict[str, ShardSpec]:
    """List the tensors of a model, from the model on the meta device: nothing is allocated.

    Args:
        model: resolved configuration; it may come from a file of strangers.
        num_tensors: how many tensors the source holds. A model of more layers is refused before anything is built.
        source: what is being read, for the message.

    Returns:
        Full shape and split of every tensor by canonical name, in the order of the layers.

    Raises:
        UserError: a size is absurd.
    """
    sizes = {name: getattr(model, name) for name in SIZES}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size is not None and not 0 < size <= LARGEST_SIZE]
    if (model.num_layers or 0) > num_tensors:
        wrong.append(f"num_layers {model.num_layers} with {num_tensors} tensors")
    if wrong:
        raise UserError(
            f"{source}: its configuration says {', '.join(wrong)}",
            f"sizes lie between 1 and {LARGEST_SIZE:,}, and a layer has tensors",
            "check that configuration and files belong together",
        )
    records = [
        shard_of(parameter) for parameter in GPTModel(Shape.of(model), ParameterFactory.of_shapes()).parameters()
    ]
    return {record.name: record.spec for record in records}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Check that exactly the expected tensors are there, in their shapes.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; all offenders are named.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(shape)}, expected {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    _refuse({"missing ": missing, "unknown ": unknown, "wrong shape: ": wrong}, source)


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Check that exactly the expected tensors are there, in their shapes, in floating point, with finite values.

    Args:
        tensors: full tensors by name.
        shapes: expected shapes by the same names.
        source: what is being read, for the message.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or type, or holds NaN or infinity; all are named.
    """
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, source=source)
    types = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    _refuse({"not floating point: ": types}, source)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    _refuse({"NaN or infinite values in ": broken}, source)


def save_full_checkpoint(
    run_dir: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    step: int = 0,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a weights-only checkpoint from whole tensors under their canonical names.

    Args:
        run_dir: folder of the run.
        config: resolved configuration.
        tensors: full canonical tensors, fp32.
        step: of the checkpoint.
        more: further fields of the manifest.

    Raises:
        UserError: names, shapes or types are not those of the model in ``config``, or values are not finite.
        Failure: the folder cannot be written.
    """
    specs = model_tensors(config.model, num_tensors=len(tensors), source=str(run_dir))
    check_tensors(tensors, full_shapes(specs), source=str(run_dir))
    fragments = [Fragment(WEIGHT, name, 0, 1, 0, tensors[name].reshape(-1)) for name in specs]
    state = {"step": step, "consumed_samples": 0, "optimizer_steps": 0, **(more or {}), "config": config}
    saving = Saving(Path(run_dir), fragments=fragments, specs=specs, state=state, context=ParallelContext())
    return saving.publish()


def open_whole_model(tag: Path, weights: str = WEIGHT) -> CheckpointReader:
    """Open a checkpoint, perhaps of strangers, whose tensors are those of the model in its configuration.

    Args:
        tag: its folder.
        weights: kind that is read as the weights.

    Raises:
        UserError: it cannot be read, or they are not; nothing of the claimed size was built.
    """
    reader = CheckpointReader(tag, weights)
    expected = model_tensors(reader.config.model, num_tensors=len(reader.specs), source=str(tag))
    check_shapes(full_shapes(reader.specs), full_shapes(expected), source=str(tag))
    return reader


def full_shapes(specs: Mapping[str, ShardSpec]) -> dict[str, tuple[int, ...]]:
    """The whole shapes, by name."""
    return {name: spec.full_shape for name, spec in specs.items()}


def _refuse(problems: Mapping[str, list[str]], source: str, limit: int = 8) -> None:
    """Raise if there is any problem; long lists are cut and counted."""
    listed = [
        f"{label}{', '.join(names[:limit])}" + (f" and {len(names) - limit} more" if len(names) > limit else "")
        for label, names in problems.items()
        if names
    ]
    if listed:
        raise UserError(
            f"{source}: {'; '.join(listed)}",
            "every tensor of the model must be there, finite, and nothing else, so nothing was converted",
            "check that the files belong to one model and that its configuration is the right one",
        )
