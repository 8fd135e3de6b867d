"""config.json of a Hugging Face folder: written from our configuration, and read back into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.tensors import LARGEST_SIZE
from megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron.convert.huggingface import CLASSES, MODEL_TYPES, check_ranges
from megatron.errors import UserError

# Mistral without a sliding window is Llama. Its class has other defaults, so it is read with its own configuration.
READABLE = {**{name: family for family, name in CLASSES.items()}, "MistralForCausalLM": "ar"}
CONFIG_CLASSES = {
    "LlamaForCausalLM": "LlamaConfig",
    "EuroBertForMaskedLM": "EuroBertConfig",
    "MistralForCausalLM": "MistralConfig",
}
# Sizes that a configuration of strangers names, before any library makes something of them.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def huggingface_config(
    config: Config, *, family: str, vocab_rows: int, dtype: str, eod_id: int | None
) -> dict[str, Any]:
    """Describe a model for ``transformers``.

    Args:
        config: resolved configuration of the run.
        family: "ar" or "mdm": which class.
        vocab_rows: rows of the embedding that are written.
        dtype: "float32", "bfloat16" or "float16".
        eod_id: end-of-document token, which starts and ends every text; ``None`` when unknown.
    """
    model = config.model
    fields: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "bos_token_id": eod_id,
        "dtype": dtype,
        "eos_token_id": eod_id,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings or model.seq_length,
        "mlp_bias": False,
        "model_type": MODEL_TYPES[CLASSES[family]],
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "pad_token_id": None,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,  # where transformers 4 looks
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": vocab_rows,
    }
    if family == "mdm":
        fields["mask_token_id"] = config.objective.mask_token_id
    return fields


def write_config(fields: dict[str, Any], folder: Path) -> None:
    """Write config.json and, for a causal model, generation_config.json."""
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if fields["model_type"] == "llama":
        generation = {name: fields[name] for name in ("bos_token_id", "eos_token_id")} | {
            "pad_token_id": fields["eos_token_id"]
        }
        text = json.dumps(generation, indent=2, sort_keys=True) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def read_config(folder: Path) -> tuple[Config, str]:
    """Read config.json with the classes of ``transformers`` (for their defaults); no code of the folder is run.

    Returns:
        Configuration (model, objective, precision; no tokenizer yet) and the family, "ar" or "mdm".

    Raises:
        ValueError: another architecture, or a setting that our model does not have; it is named.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architectures = raw.get("architectures")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error})",
            "a Hugging Face folder needs its config.json",
            "download the folder again",
        ) from error
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if name not in READABLE:
        raise UserError(
            f"{path} is of {architectures}",
            f"only {', '.join(READABLE)} have the blocks of this repository",
            "other models cannot be read",
        )
    family = READABLE[name]
    _check_sizes(raw, path)
    theirs = _transformers_config(name, raw, path)
    _check_supported(theirs, path)
    rope = theirs.rope_parameters or {}
    model = ModelConfig(
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        kv_channels=theirs.head_dim,
        ffn_hidden_size=theirs.intermediate_size,
        seq_length=theirs.max_position_embeddings,
        max_position_embeddings=theirs.max_position_embeddings,
        padded_vocab_size=theirs.vocab_size,  # exactly the rows of the file: none is added
        layernorm_epsilon=float(theirs.rms_norm_eps),
        rotary_base=float(rope.get("rope_theta", 10000.0)),
        untie_embeddings_and_output_weights=not theirs.tie_word_embeddings,
        attention_dropout=float(theirs.attention_dropout or 0.0),
        hidden_dropout=0.0,
        init_method_std=float(theirs.initializer_range),
    )
    check_ranges(model, str(path))
    mask = theirs.mask_token_id if family == "mdm" else None
    objective = ObjectiveConfig(objective=family, mask_token_id=mask)
    if mask is not None and not 0 <= mask < theirs.vocab_size:
        raise UserError(
            f"{path}: mask_token_id {mask} is outside of the {theirs.vocab_size} rows", "it must be a row", "correct it"
        )
    run = RunConfig(bf16=str(raw.get("dtype", raw.get("torch_dtype"))).endswith("bfloat16"))
    return Config(model=model, objective=objective, data=DataConfig(vocab_size=theirs.vocab_size), run=run), family


def _check_sizes(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse sizes that no model has; types are for the class to judge."""
    sizes = {name: raw[name] for name in SIZES if isinstance(raw.get(name), int | float)}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if not 0 < size <= LARGEST_SIZE]:
        raise UserError(
            f"{path} has {', '.join(wrong)}", f"sizes lie between 1 and {LARGEST_SIZE:,}", "correct the file"
        )


def _transformers_config(name: str, raw: dict[str, Any], path: Path) -> Any:
    """Make the configuration object of the class, which fills in defaults and checks types."""
    try:
        import transformers

        Class: Any = getattr(transformers, CONFIG_CLASSES[name])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path} is of {name}, which the installed transformers lacks",
            "EuroBert came with transformers 5",
            "run: pip install -U transformers",
        ) from error
    try:
        return Class(**{field: value for field, value in raw.items() if field != "auto_map"})
    except Exception as error:  # transformers raises classes of its own for each rule
        raise UserError(
            f"{path} is not a valid {Class.__name__} ({error})", "transformers refuses it too", "correct the file"
        ) from error


def _check_supported(theirs: Any, path: Path) -> None:
    """Refuse, by name, settings of the two classes that our model does not have."""
    rope = theirs.rope_parameters or {}
    window = getattr(theirs, "sliding_window", None)
    found = {
        "hidden_act": "silu" if theirs.hidden_act == "swish" else theirs.hidden_act,  # two names of one function
        "attention_bias": getattr(theirs, "attention_bias", False),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "sliding_window": None if window is not None and window >= theirs.max_position_embeddings else window,
        "rope_type": rope.get("rope_type", "default"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
    }
    wrong = [f"{name} {value!r} (must be {wanted[name]!r})" for name, value in found.items() if value != wanted[name]]
    if wrong:
        raise UserError(
            f"{path} has {', '.join(wrong)}",
            "the model of this repository has no such variant, and ignoring it would change the logits",
            "this folder cannot be read",
        )
