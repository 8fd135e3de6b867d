"""The shape of a model with nothing left open: what the flags, a preset and the vocabulary decide together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.config.presets import PRESETS, swiglu_width
from megatron.config.schema import ModelConfig
from megatron.errors import UserError, require


@dataclass(frozen=True)
class Shape:
    """Everything that the layers of a model are built from. Sizes in channels, heads, tokens and rows, all known."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    seq_length: int
    max_position_embeddings: int
    padded_vocab_size: int
    normalization: str = "rmsnorm"
    layernorm_epsilon: float = 1e-5
    swiglu: bool = True
    use_rotary_position_embeddings: bool = True
    rotary_base: float = 10000.0
    disable_bias_linear: bool = True
    untie_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_backend: str = "sdpa"
    swiglu_backend: str = "torch"
    init_method_std: float = 0.02

    @classmethod
    def from_flags(cls, flags: ModelConfig, *, padded_vocab_size: int) -> Shape:
        """Sizes from the flags, then the preset, then each other.

        Args:
            flags: as given; the recorded settings of a run are complete and come back as they are.
            padded_vocab_size: rows of the embedding matrix.

        Raises:
            UserError: unknown preset, a size that is missing, or sizes that do not fit.
        """
        preset = _preset(flags.model)
        hidden = _known("hidden_size", flags.hidden_size, preset)
        heads = _known("num_attention_heads", flags.num_attention_heads, preset)
        ffn = flags.ffn_hidden_size or (swiglu_width(hidden) if flags.swiglu else 4 * hidden)
        require(
            ffn > 0,
            f"--hidden-size {hidden} gives a feed-forward width of floor(8h/3/64)*64 = 0",
            "the width is positive",
            "pass --ffn-hidden-size, or a hidden size of 24 or more",
        )
        values: dict[str, Any] = {item.name: getattr(flags, item.name) for item in fields(cls)}
        values |= {
            "num_layers": _known("num_layers", flags.num_layers, preset),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": flags.num_query_groups or heads,
            "kv_channels": flags.kv_channels or preset.get("kv_channels") or _channels(hidden, heads),
            "ffn_hidden_size": ffn,
            "max_position_embeddings": flags.max_position_embeddings or flags.seq_length,
            "padded_vocab_size": padded_vocab_size,
        }
        return cls(**values)

    @classmethod
    def of(cls, recorded: ModelConfig) -> Shape:
        """The shape that a record, a checkpoint or a converted configuration describes: every size is in it.

        Raises:
            UserError: the rows of the embedding are not.
        """
        rows = recorded.padded_vocab_size
        if rows is None:
            raise UserError(
                "the model has no padded_vocab_size", "a record holds every size", "give --padded-vocab-size"
            )
        return cls.from_flags(recorded, padded_vocab_size=rows)

    def recorded(self, flags: ModelConfig) -> ModelConfig:
        """The model section of a run's record: the flags with every size filled in."""
        return ModelConfig(
            model=flags.model, make_vocab_size_divisible_by=flags.make_vocab_size_divisible_by, **asdict(self)
        )


def _preset(name: str | None) -> dict[str, int]:
    if name is None:
        return {}
    names = {preset.lower(): preset for preset in PRESETS}
    require(
        name.lower() in names,
        f"--model {name!r} is not a preset",
        f"presets are {', '.join(PRESETS)}",
        "choose one of them or give --num-layers, --hidden-size and --num-attention-heads",
    )
    return PRESETS[names[name.lower()]]._asdict()


def _known(name: str, value: int | None, preset: dict[str, int]) -> int:
    value = value or preset.get(name)
    if value is None:
        flag = "--" + name.replace("_", "-")
        raise UserError(
            f"the model has no {flag}", "a model needs a preset or explicit sizes", f"pass --model 7M or {flag}"
        )
    return value


def _channels(hidden: int, heads: int) -> int:
    require(
        hidden % heads == 0,
        f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}",
        "channels per head must be a whole number",
        "change one of them or pass --kv-channels",
    )
    return hidden // heads


def padded_size(vocab_size: int, *, multiple: int, tp_size: int) -> int:
    """Rows of the embedding matrix: the vocabulary, padded to ``multiple``.

    The same for every tensor-parallel size that divides ``multiple`` (1, 2, 4, … 128 for the default), because padding
    rows take part in the softmax: a model must not depend on the layout. Megatron pads to ``multiple · tp_size``. Other
    sizes pad to the next number that they divide.
    """
    rows = -(-vocab_size // multiple) * multiple
    return -(-rows // tp_size) * tp_size
