"""Write and read folders of ``transformers``: AR models as ``LlamaForCausalLM``, MDM models as ``EuroBertForMaskedLM``.

Both classes are our block with other names: pre-norm RMSNorm computed in fp32, no biases, rotate-half RoPE on all
channels of a head, softmax scale 1/sqrt(head_dim), ``silu(gate) * up``. They differ only in the attention: causal
against full.

Vocabulary: all rows of the embedding are written, padding included, so that probabilities are those of training, where
the softmax runs over the padded vocabulary, and so that nothing is lost on the way back. ``trim_vocab`` drops the rows
that no token uses. Reading never adds a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.tensors import model_tensors
from megatron.checkpoint.warm_start import VOCABULARY_TENSORS
from megatron.checkpoint.writer import save_file
from megatron.config.option import check_range
from megatron.config.schema import Config, ModelConfig
from megatron.errors import UserError, require
from megatron.files import read_object, written_whole
from megatron.objectives import build_objective
from megatron.objectives.base import CausalDecoding, MaskedDecoding
from megatron.screen import Progress

CLASSES = {"ar": "LlamaForCausalLM", "mdm": "EuroBertForMaskedLM"}
MODEL_TYPES = {"LlamaForCausalLM": "llama", "EuroBertForMaskedLM": "eurobert"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Buffers that old versions of transformers saved; they follow from the configuration.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"


def attention_family(config: Config) -> str:
    """Return which class evaluates the model: "ar" (causal attention) or "mdm" (full attention).

    Raises:
        ValueError: the objective evaluates with a mask that neither class has.
    """
    objective = build_objective(config).for_eval()
    if isinstance(objective.decoding, CausalDecoding):
        return "ar"
    if isinstance(objective.decoding, MaskedDecoding) and objective.decoding.shift == 0:
        return "mdm"
    raise UserError(
        f"objective {config.objective.objective} evaluates with {type(objective.attention_mask).__name__} attention and "
        f"{objective.decoding}",
        "LlamaForCausalLM is causal, and EuroBertForMaskedLM fills masks in both directions, where they stand",
        "keep the model in this repository's format",
    )


def check_expressible(model: ModelConfig) -> None:
    """Refuse, before anything is read or written, a model that the two classes cannot express.

    Raises:
        ValueError: LayerNorm, GELU, biases, learned positions or a width that the heads do not divide; all are named.
    """
    problems = []
    if model.normalization != "rmsnorm":
        problems.append(f"--normalization {model.normalization}")
    if not model.swiglu:
        problems.append("--no-swiglu (GELU)")
    if not model.disable_bias_linear:
        problems.append("--no-disable-bias-linear (biases)")
    if not model.use_rotary_position_embeddings:
        problems.append("--no-use-rotary-position-embeddings (learned positions)")
    if (model.hidden_size or 0) % (model.num_attention_heads or 1):
        problems.append(f"--hidden-size {model.hidden_size} with {model.num_attention_heads} heads (must divide)")
    if problems:
        raise UserError(
            f"the model was trained with {', '.join(problems)}",
            "LlamaForCausalLM and EuroBertForMaskedLM have only RMSNorm, SwiGLU, no biases and RoPE",
            "keep it in this repository's format, or train with the default architecture",
        )


def check_ranges(model: ModelConfig, source: str) -> None:
    """Refuse values of strangers that no flag could have given, such as an epsilon of NaN.

    Raises:
        UserError: the first one.
    """
    for item in fields(model):
        value, choices = getattr(model, item.name), item.metadata.get("choices")
        try:
            check_range(item, value)
            require(not choices or value in (None, *choices), f"{item.name} {value!r}", f"it is one of {choices}", "")
        except UserError as error:
            fix = "check that configuration and files belong together"
            raise UserError(f"{source}: {error.given}", error.rule, fix) from None


def to_huggingface(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename canonical tensors and cut the stacked matrices. The values are views: no copy, no change.

    Args:
        tensors: full canonical tensors.
        model: resolved configuration.
    """
    kv, heads = model.kv_channels or 0, model.num_attention_heads or 0
    groups = model.num_query_groups or heads
    out = {"model.embed_tokens.weight": tensors["word_embeddings.weight"]}
    for layer in range(model.num_layers or 0):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        stacked = tensors[f"{ours}.self_attention.query_key_value.weight"].split([heads * kv, groups * kv, groups * kv])
        for name, part in zip(("q_proj", "k_proj", "v_proj"), stacked):
            out[f"{theirs}.self_attn.{name}.weight"] = part
        out[f"{theirs}.self_attn.o_proj.weight"] = tensors[f"{ours}.self_attention.dense.weight"]
        for name, part in zip(("gate_proj", "up_proj"), tensors[f"{ours}.mlp.dense_h_to_4h.weight"].chunk(2)):
            out[f"{theirs}.mlp.{name}.weight"] = part
        out[f"{theirs}.mlp.down_proj.weight"] = tensors[f"{ours}.mlp.dense_4h_to_h.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{theirs}.{name}.weight"] = tensors[f"{ours}.{name}.weight"]
    out["model.norm.weight"] = tensors["final_layernorm.weight"]
    if model.untie_embeddings_and_output_weights:
        out["lm_head.weight"] = tensors["lm_head.weight"]
    return out


def from_huggingface(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Invert :func:`to_huggingface`; the stacked matrices are copies, the others views."""
    out = {"word_embeddings.weight": tensors["model.embed_tokens.weight"]}
    for layer in range(model.num_layers or 0):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        stacked = [tensors[f"{theirs}.self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
        out[f"{ours}.input_layernorm.weight"] = tensors[f"{theirs}.input_layernorm.weight"]
        out[f"{ours}.self_attention.query_key_value.weight"] = torch.cat(stacked)
        out[f"{ours}.self_attention.dense.weight"] = tensors[f"{theirs}.self_attn.o_proj.weight"]
        out[f"{ours}.post_attention_layernorm.weight"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        gate_up = [tensors[f"{theirs}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        out[f"{ours}.mlp.dense_h_to_4h.weight"] = torch.cat(gate_up)
        out[f"{ours}.mlp.dense_4h_to_h.weight"] = tensors[f"{theirs}.mlp.down_proj.weight"]
    out["final_layernorm.weight"] = tensors["model.norm.weight"]
    if model.untie_embeddings_and_output_weights:
        out["lm_head.weight"] = tensors["lm_head.weight"]
    return out


def huggingface_shapes(model: ModelConfig, *, num_tensors: int, source: str) -> dict[str, tuple[int, ...]]:
    """List the tensors of the Hugging Face folder of a model: shapes by their names there; see :func:`model_tensors`."""
    specs = model_tensors(model, num_tensors=num_tensors, source=source)
    ours = {name: torch.empty(spec.full_shape, device="meta") for name, spec in specs.items()}
    return {name: tuple(tensor.shape) for name, tensor in to_huggingface(ours, model).items()}


def kept_rows(config: Config, vocab_rows: int) -> int:
    """Return the rows that tokens use: the vocabulary and, for a masked model, the mask token."""
    used = config.data.vocab_size or vocab_rows
    if config.objective.mask_token_id is not None and attention_family(config) == "mdm":
        used = max(used, config.objective.mask_token_id + 1)
    return min(used, vocab_rows)


def write_weights(tensors: Mapping[str, Tensor], folder: Path, *, max_shard_size: str = "5GB") -> int:
    """Write safetensors, in several files with an index above ``max_shard_size``. Returns the bytes of the tensors."""
    pattern = SINGLE.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    parts = plan.filename_to_tensors
    for file, names in Progress("writing", len(parts), unit="files").over(parts.items()):
        part = {name: tensors[name].contiguous() for name in names}
        with written_whole(folder / file):
            save_file(part, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all safetensors of a folder, through the index where there is one.

    Raises:
        ValueError: no safetensors, a file of the index is missing or truncated, or a tensor is not where the index
        says.
    """
    places: dict[str, str] | None = None
    files = [SINGLE]
    if (folder / INDEX).is_file():
        places = _read_index(folder / INDEX)
        files = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in Progress("reading", len(files), unit="files").over(files):
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(
                f"{folder} has no {file}",
                "weights are read from safetensors only (pickled .bin files can run code)",
                "download the folder again, or save the model with save_pretrained",
            )
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged ({error})",
                "a safetensors file must be complete",
                "download or copy it again",
            ) from error
        misplaced = [name for name in found if name in tensors or (places is not None and places.get(name) != file)]
        if misplaced:
            raise UserError(
                f"{path} holds {', '.join(sorted(misplaced)[:8])}, which the index does not place there",
                "every tensor has one place",
                "the folder mixes two models",
            )
        tensors.update(found)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED_SUFFIX)}


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor."""
    rule, fix = "the index says which file holds a tensor", "download it again"
    places = read_object(path, rule=rule, fix=fix).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path} cannot be read (weight_map is no table of names)", rule, fix)
    return places


def trim_rows(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Keep the first ``rows`` rows of the embedding and of the output head."""
    return {name: tensor[:rows] if name in VOCABULARY_TENSORS else tensor for name, tensor in tensors.items()}
