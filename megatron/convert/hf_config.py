"""config.json of a Hugging Face folder: written from our configuration, and read back into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron.convert.huggingface import CLASSES, MODEL_TYPES
from megatron.errors import UserError


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
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error})",
            "a Hugging Face folder needs its config.json",
            "download the folder again",
        ) from error
    families = {name: family for family, name in CLASSES.items()}
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in families:
        raise UserError(
            f"{path} is of {architectures}",
            "only LlamaForCausalLM and EuroBertForMaskedLM have the blocks of this repository",
            "other models cannot be read",
        )
    family = families[architectures[0]]
    theirs = _transformers_config(family, raw, path)
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
    mask = theirs.mask_token_id if family == "mdm" else None
    objective = ObjectiveConfig(objective=family, mask_token_id=mask)
    if mask is not None and not 0 <= mask < theirs.vocab_size:
        raise UserError(
            f"{path}: mask_token_id {mask} is outside of the {theirs.vocab_size} rows", "it must be a row", "correct it"
        )
    run = RunConfig(bf16=str(raw.get("dtype", raw.get("torch_dtype"))).endswith("bfloat16"))
    return Config(model=model, objective=objective, data=DataConfig(vocab_size=theirs.vocab_size), run=run), family


def _transformers_config(family: str, raw: dict[str, Any], path: Path) -> Any:
    """Make the configuration object of the class, which fills in defaults and checks types."""
    try:
        import transformers

        Class: Any = transformers.LlamaConfig if family == "ar" else transformers.EuroBertConfig
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path} is of {CLASSES[family]}, which the installed transformers lacks",
            "EuroBert came with transformers 5",
            "run: pip install -U transformers",
        ) from error
    try:
        return Class(**{name: value for name, value in raw.items() if name != "auto_map"})
    except Exception as error:  # transformers raises classes of its own for each rule
        raise UserError(
            f"{path} is not a valid {Class.__name__} ({error})", "transformers refuses it too", "correct the file"
        ) from error


def _check_supported(theirs: Any, path: Path) -> None:
    """Refuse, by name, settings of the two classes that our model does not have."""
    rope = theirs.rope_parameters or {}
    found = {
        "hidden_act": theirs.hidden_act,
        "attention_bias": theirs.attention_bias,
        "mlp_bias": theirs.mlp_bias,
        "rope_type": rope.get("rope_type", "default"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
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
