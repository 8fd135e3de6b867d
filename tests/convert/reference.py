"""Independent pieces for the tests of conversions: a plain-torch model and a writer of the published layout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.tensors import model_tensors
from megatron.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron.config.shape import Shape


def plain_logits(
    layers: Mapping[int, Mapping[str, Tensor]], ids: Tensor, *, heads: int, kv: int, causal: bool
) -> Tensor:
    """Evaluate the tensors of published layer files (tp 1) straight from FACTS 2: nothing of the repository is used.

    Pre-norm RMSNorm with eps 1e-5, rotate-half RoPE with base 10000 on all channels, softmax scale 1/sqrt(kv),
    silu(gate) * up, tied or own head. ids [batch, seq] -> logits [batch, seq, rows] in fp64.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight.double()

    def rotate(x: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(0, kv, 2, dtype=torch.float64) / kv)
        angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
        first, second = x[..., : kv // 2], x[..., kv // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    last = max(layer for layer in layers if "weight" in layers[layer])
    batch, seq = ids.shape
    x = layers[1]["word_embeddings.weight"].double()[ids]
    for layer in range(2, last):
        t = {name: tensor.double() for name, tensor in layers[layer].items()}
        q, k, v = (norm(x, t["input_layernorm.weight"]) @ t["self_attention.query_key_value.weight"].T).chunk(3, dim=-1)
        q, k, v = (part.view(batch, seq, heads, kv).transpose(1, 2) for part in (q, k, v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / kv**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, heads * kv)
        x = x + mixed @ t["self_attention.dense.weight"].T
        gate, up = (norm(x, t["post_attention_layernorm.weight"]) @ t["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ t["mlp.dense_4h_to_h.weight"].T
    head = layers[last + 1]["lm_head.weight"] if last + 1 in layers else layers[1]["word_embeddings.weight"]
    return norm(x, layers[last]["weight"]) @ head.double().T


def random_tensors(model: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Canonical tensors that look trained: no two alike, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in model_tensors(model, num_tensors=1000, source="test").items():
        values = torch.randn(spec.full_shape, generator=generator)
        tensors[name] = 1 + 0.1 * values if "layernorm.weight" in name else 0.08 * values
    return tensors


def make_config(
    objective: str = "ar", *, vocab_size: int = 300, rows: int = 384, bf16: bool = False, **changes: object
) -> Config:
    """A small resolved configuration."""
    shape = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 32, "ffn_hidden_size": 64}
    given = ModelConfig(**{**shape, "padded_vocab_size": rows, **changes})  # type: ignore[arg-type]
    return Config(
        model=Shape.of(given).recorded(),
        objective=ObjectiveConfig(objective=objective, mask_token_id=vocab_size if objective == "mdm" else None),
        data=DataConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size),
        run=RunConfig(bf16=bf16),
    )


def layer_files(config: Config, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Sort canonical tensors into the layer files of the published layout (tp 1)."""
    last = (config.model.num_layers or 0) + 2
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layers.setdefault(int(index) + 2, {})[rest] = tensor
        elif name.startswith("final_layernorm."):
            layers.setdefault(last, {})[name.removeprefix("final_layernorm.")] = tensor
        elif name == "position_embeddings.weight":
            layers.setdefault(1, {})[name] = tensor[:-1]
        else:
            layers.setdefault(last + 1 if name == "lm_head.weight" else 1, {})[name] = tensor
    return layers


def published_args(config: Config, tp: int) -> argparse.Namespace:
    model = config.model
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        padded_vocab_size=model.padded_vocab_size,
        vocab_size=config.data.vocab_size,
        make_vocab_size_divisible_by=128,
        seq_length=model.seq_length,
        max_position_embeddings=model.max_position_embeddings,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        swiglu=model.swiglu,
        add_bias_linear=not model.disable_bias_linear,
        use_rotary_position_embeddings=model.use_rotary_position_embeddings,
        rope_theta=10000,
        rotary_percent=1.0,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        init_method_std=0.02,
        tensor_model_parallel_size=tp,
        tokenizer_type="GPT2BPETokenizer",
        params_dtype=torch.float32,
        num_experts=[1],
    )


def write_published(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    tp: int = 1,
    dtype: torch.dtype = torch.float32,
    **state: object,
) -> Path:
    """Write tensors as DeepSpeed's pipeline engine would, every rank with its own [Q_r; K_r; V_r] and [gate_r; up_r]."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    for layer, contents in layer_files(config, tensors).items():
        for rank in range(tp):
            part = {
                name: rank_part(name, tensor, rank, tp, config).to(dtype).clone() for name, tensor in contents.items()
            }
            torch.save(part, tag / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(tp):
        saved = {"module": None, "args": published_args(config, tp), "iteration": 7, "global_steps": 7, **state}
        torch.save(saved, tag / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def rank_part(name: str, tensor: Tensor, rank: int, tp: int, config: Config) -> Tensor:
    """The rows or columns of one tensor-parallel rank, written out by hand."""
    model = config.model
    if "query_key_value" in name:
        size = (model.num_attention_heads or 0) * (model.kv_channels or 0)
        q, k, v = tensor[:size], tensor[size : 2 * size], tensor[2 * size :]
        step = size // tp
        return torch.cat([m[rank * step : (rank + 1) * step] for m in (q, k, v)])
    if "dense_h_to_4h" in name:
        width = model.ffn_hidden_size or 0
        step = width // tp
        starts = (0, width) if model.swiglu else (0,)
        return torch.cat([tensor[start + rank * step : start + (rank + 1) * step] for start in starts])
    if name in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"):
        step = tensor.shape[1] // tp
        return tensor[:, rank * step : (rank + 1) * step]
    if name in ("word_embeddings.weight", "lm_head.weight"):
        step = tensor.shape[0] // tp
        return tensor[rank * step : (rank + 1) * step]
    return tensor
