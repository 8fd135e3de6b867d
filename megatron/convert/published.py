"""Read the published checkpoints: the DeepSpeed-pipeline layout of Megatron-DeepSpeed.

A folder ``global_stepN`` holds ``layer_KK-model_TT-model_states.pt`` (layer KK of the pipeline, tensor-parallel rank
TT) and ``mp_rank_TT_model_states.pt``, whose ``args`` is the ``argparse.Namespace`` of the run. Layer 01 is the
embedding,
02 to L+1 are the blocks, L+2 is the last norm and L+3 the output head where it is not tied. Under tensor parallelism
every rank holds its own ``[Q_r; K_r; V_r]`` and ``[gate_r; up_r]``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensors import check_tensors, full_shapes, model_tensors
from megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron.convert.huggingface import check_ranges
from megatron.convert.published_layers import FIRST_RANK, join_layers, list_files
from megatron.convert.unpickle import load_pickled
from megatron.errors import UserError, require
from megatron.screen import Progress

GPT2_VOCAB_SIZE = 50257
POSITIONS = "position_embeddings.weight"

# Switches of the reference code that change the model in a way our model does not have: name -> accepted values.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "squared_relu": (False, None),
    "openai_gelu": (False, None),
    "onnx_safe": (False, None),
    "rotary_percent": (1.0, None),
    "num_experts": ([1], 1, None),
    "embed_layernorm": (False, None),
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint in our terms: full tensors (fp32) by canonical name, configuration, step."""

    tensors: dict[str, Tensor]
    config: Config
    step: int


def find_published(path: str | Path) -> Path:
    """Return the ``global_stepN`` folder of a run folder (through its ``latest`` file) or of itself.

    Raises:
        ValueError: neither; or ``latest`` names a folder that is not there.
    """
    path = Path(path)
    if any(path.glob("layer_*-model_*-model_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        raise UserError(
            f"{path} holds neither layer_KK-model_TT-model_states.pt files nor a file `latest`",
            "a DeepSpeed-pipeline checkpoint has one of them",
            "give the folder that contains `latest`, or one global_stepN folder",
        )
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w.\-]+", tag) or not (path / tag).is_dir():
        raise UserError(
            f"{latest} names {tag!r}, and {path} has no such folder",
            "`latest` must name a checkpoint beside it",
            "give the global_stepN folder itself",
        )
    return path / tag


def read_published(path: str | Path, *, objective: str) -> PublishedCheckpoint:
    """Read a published checkpoint of any tensor-parallel size, fp32, bf16 or fp16, tied or untied.

    Args:
        path: run folder (with ``latest``) or ``global_stepN`` folder.
        objective: "ar" or "mdm". The files do not say which one trained them: both have the same tensors.

    Returns:
        Tensors in fp32 (an exact copy of bf16 values) and a configuration derived from ``args`` and the shapes.

    Raises:
        ValueError: a file is missing, damaged, hostile or unknown; a tensor is missing, unknown or of the wrong shape;
            ``args`` asks for something that our model does not have. Nothing is written in any case.
    """
    if objective not in ("ar", "mdm"):
        raise UserError(
            f"objective {objective!r} given", "published checkpoints were trained as ar or mdm", "pass one of these"
        )
    folder = find_published(path)
    files, tp_size = list_files(folder)
    state = load_pickled(folder / FIRST_RANK)
    args = state.get("args") if isinstance(state, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise UserError(
            f"{folder / FIRST_RANK} has no `args`",
            "the configuration is read from that argparse.Namespace",
            "check that this is a Megatron-DeepSpeed checkpoint",
        )
    with _deriving(folder):
        _check_args(args, tp_size, folder)
    reading = Progress("reading", len(files), unit="layers").over(files.items())
    layers = {layer: [load_pickled(file) for file in ranks] for layer, ranks in reading}
    with _deriving(folder):
        model = _model_config(args, layers, folder)
    num_tensors = sum(len(ranks[0]) for ranks in layers.values() if isinstance(ranks[0], dict))
    specs = model_tensors(model, num_tensors=num_tensors, source=str(folder))
    if POSITIONS in specs:  # theirs has a row for each position of the context, ours one more, never seen in training
        rows, hidden = specs[POSITIONS].full_shape
        specs[POSITIONS] = replace(specs[POSITIONS], full_shape=(rows - 1, hidden))
    tensors = join_layers(layers, specs, folder)
    check_tensors(tensors, full_shapes(specs), source=str(folder))
    if POSITIONS in specs:
        tensors[POSITIONS] = torch.cat([tensors[POSITIONS], tensors[POSITIONS][-1:]])
    bf16 = tensors["word_embeddings.weight"].dtype == torch.bfloat16
    with _deriving(folder):
        config = _config(args, state, model, objective=objective, bf16=bf16)
        step = int(state.get("iteration") or state.get("global_steps") or 0)
    return PublishedCheckpoint({name: tensor.float() for name, tensor in tensors.items()}, config, step)


@contextmanager
def _deriving(folder: Path) -> Iterator[None]:
    """Say in words that values of strangers are absent, or of another kind or range."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the model cannot be derived ({error})",
            "args must hold the sizes of a Megatron-DeepSpeed GPT and layer 02 its first block",
            "check that this is such a checkpoint",
        ) from error


def _check_args(args: argparse.Namespace, tp_size: int, folder: Path) -> None:
    """Refuse, by name, settings of the run that our model cannot express or that contradict the files."""
    for name, accepted in SWITCHES.items():
        value = getattr(args, name, None)
        if value not in accepted:
            raise UserError(
                f"{folder}: args.{name} is {value!r}",
                f"the model here has no such variant (accepted: {accepted[0]!r})",
                "this checkpoint cannot be converted",
            )
    heads, groups = args.num_attention_heads, getattr(args, "num_key_value_heads", None)
    if groups not in (None, heads):
        raise UserError(
            f"{folder}: args.num_key_value_heads is {groups} with {heads} query heads",
            (
                "the row order of grouped-query weights in this layout is not documented, and a guess would "
                "give a wrong model"
            ),
            "convert it with the code that wrote it",
        )
    recorded = getattr(args, "tensor_model_parallel_size", tp_size)
    if recorded != tp_size:
        raise UserError(
            f"{folder} has files of {tp_size} tensor-parallel ranks, args says {recorded}",
            "all ranks' files are needed",
            "download or copy the checkpoint again",
        )


def _model_config(args: argparse.Namespace, layers: dict[int, list[dict[str, Tensor]]], folder: Path) -> ModelConfig:
    """Derive the model from ``args``; the feed-forward width from the shapes (launch scripts list another one)."""
    untied = bool(getattr(args, "untie_embeddings_and_output_weights", False))
    swiglu = bool(args.swiglu)
    hidden, heads = int(args.hidden_size), int(args.num_attention_heads)
    up = layers[2][0]["mlp.dense_h_to_4h.weight"] if 2 in layers else None
    rows = up.shape[0] * len(layers[2]) if isinstance(up, Tensor) else 0
    model = ModelConfig(
        num_layers=int(args.num_layers),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=int(args.kv_channels or hidden // heads),
        ffn_hidden_size=rows // 2 if swiglu else rows,
        seq_length=int(args.seq_length),
        max_position_embeddings=int(args.max_position_embeddings),
        make_vocab_size_divisible_by=int(args.make_vocab_size_divisible_by),
        padded_vocab_size=int(args.padded_vocab_size),
        normalization=str(args.normalization),
        layernorm_epsilon=float(args.layernorm_epsilon),
        swiglu=swiglu,
        use_rotary_position_embeddings=bool(args.use_rotary_position_embeddings),
        rotary_base=float(getattr(args, "rope_theta", 10000)),
        disable_bias_linear=not args.add_bias_linear,
        untie_embeddings_and_output_weights=untied,
        attention_dropout=float(args.attention_dropout),
        hidden_dropout=float(args.hidden_dropout),
        init_method_std=float(args.init_method_std),
    )
    check_ranges(model, str(folder))
    last = int(args.num_layers) + (3 if untied else 2)
    if len(layers) != last:
        raise UserError(
            f"{folder} has layer files {min(layers)} to {max(layers)}",
            f"{args.num_layers} blocks with {'its own' if untied else 'a tied'} output head need files 1 to {last}",
            "the folder is incomplete or its args belong to another model",
        )
    width, allowed = model.ffn_hidden_size, {getattr(args, "ffn_hidden_size", None)}
    if swiglu:
        allowed.add(8 * hidden // 3 // 64 * 64)  # what the reference code uses, whatever the launch script lists
    if width not in allowed:
        raise UserError(
            f"{folder}: the feed-forward weights are {width} wide, args says {args.ffn_hidden_size}",
            "they must agree",
            "the folder mixes files of two models",
        )
    return model


def _config(
    args: argparse.Namespace, state: dict[str, Any], model: ModelConfig, *, objective: str, bf16: bool
) -> Config:
    """Build the configuration: model, objective, tokenizer (without the paths of another machine) and length."""
    info = state.get("universal_checkpoint_info")
    recorded = info.get("original_vocab_size") if isinstance(info, dict) else None
    vocabulary = int(recorded or getattr(args, "vocab_size", None) or GPT2_VOCAB_SIZE)
    rows = model.padded_vocab_size or 0
    require(
        0 < vocabulary < rows + (objective == "ar"),
        f"the vocabulary has {vocabulary} tokens and the embedding {rows} rows",
        "every token needs a row, and the mask token of mdm another",
        "check args.padded_vocab_size and the objective",
    )
    data = DataConfig(tokenizer_type=getattr(args, "tokenizer_type", None), vocab_size=vocabulary)
    run = RunConfig(
        bf16=bf16, seed=int(getattr(args, "seed", 1234)), global_batch_size=getattr(args, "global_batch_size", None)
    )
    if getattr(args, "train_samples", None):
        run = replace(run, train_samples=int(args.train_samples))
    mask = vocabulary if objective == "mdm" else None
    return Config(model=model, objective=ObjectiveConfig(objective=objective, mask_token_id=mask), data=data, run=run)
