"""The canonical tensors of a model: their names and full shapes, and the check that a set of tensors is exactly that.

Names and row order ([Q; K; V] and [gate; up]) are those of ``GPTModel.state_dict()`` without parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.errors import UserError

VOCABULARY_TENSORS = ("word_embeddings.weight", "lm_head.weight")


def canonical_shapes(model: ModelConfig, vocab_rows: int) -> dict[str, tuple[int, ...]]:
    """List the tensors of a model.

    Args:
        model: resolved configuration (no ``None`` in the fields that give the shape).
        vocab_rows: rows of the embedding, padding included.

    Returns:
        Full shape of every tensor by canonical name, in the order of the layers.
    """
    hidden, ffn = _number(model.hidden_size), _number(model.ffn_hidden_size)
    heads, kv = _number(model.num_attention_heads), _number(model.kv_channels)
    groups = model.num_query_groups or heads
    biases = not model.disable_bias_linear
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (vocab_rows, hidden)}
    if not model.use_rotary_position_embeddings:
        # One row more than the context: see megatron/model/embedding.py.
        shapes["position_embeddings.weight"] = ((model.max_position_embeddings or model.seq_length) + 1, hidden)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if model.normalization == "layernorm":
            shapes[f"{name}.bias"] = (hidden,)

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if biases:
            shapes[f"{name}.bias"] = (rows,)

    for layer in range(_number(model.num_layers)):
        prefix = f"layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        linear(f"{prefix}.self_attention.query_key_value", (heads + 2 * groups) * kv, hidden)
        linear(f"{prefix}.self_attention.dense", hidden, heads * kv)
        norm(f"{prefix}.post_attention_layernorm")
        linear(f"{prefix}.mlp.dense_h_to_4h", (2 if model.swiglu else 1) * ffn, hidden)
        linear(f"{prefix}.mlp.dense_4h_to_h", hidden, ffn)
    norm("final_layernorm")
    if model.untie_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (vocab_rows, hidden)
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Check that exactly the expected tensors are there, with their shapes, in floating point.

    Args:
        tensors: full tensors by name.
        shapes: expected shapes by the same names (:func:`canonical_shapes`, or the names of the source).
        source: what is being read, for the message.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type; all offenders are named.
    """
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    wrong = [
        f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name])
    ]
    types = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    problems = []
    if missing:
        problems.append("missing " + _some(missing))
    if unknown:
        problems.append("unknown " + _some(unknown))
    if wrong:
        problems.append("wrong shape: " + _some(wrong))
    if types:
        problems.append("not floating point: " + _some(types))
    if problems:
        raise UserError(
            f"{source}: {'; '.join(problems)}",
            "every tensor of the model must be there and nothing else, so nothing was converted",
            "check that the files belong to one model and that its configuration is the right one",
        )


def _some(names: list[str], limit: int = 8) -> str:
    """Join names for a message; a long list is cut and counted."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _number(value: int | None) -> int:
    """Return a resolved number of the configuration."""
    if value is None:
        raise UserError(
            "the model configuration has an unset size", "shapes need all of them", "pass a resolved configuration"
        )
    return value
