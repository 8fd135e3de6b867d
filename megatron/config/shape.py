"""The shape of a model with nothing left open: what the flags, a preset (a size of arXiv 2507.15857 by its listed name) and
the vocabulary decide together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from megatron.config.option import flag_of
from megatron.config.schema import ModelConfig
from megatron.errors import require

# Fields that change tensors or their meaning; everything else may differ between a checkpoint and the run it starts.
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
ARCHITECTURE = (
    *(*SIZES, "normalization", "layernorm_epsilon", "swiglu", "use_rotary_position_embeddings", "rotary_base"),
    *("disable_bias_linear", "untie_embeddings_and_output_weights"),
)


class Preset(NamedTuple):
    """Shape of a listed model."""

    hidden_size: int
    kv_channels: int
    num_attention_heads: int
    num_layers: int


# The table of arXiv 2507.15857 beside this file: a line of names, then one model a line.
TABLE = Path(__file__).with_name("model_presets.csv").read_text(encoding="utf-8")
PRESETS = {name: Preset(*map(int, sizes)) for name, *sizes in (row.split(",") for row in TABLE.splitlines()[1:])}


def swiglu_width(hidden_size: int) -> int:
    """Feed-forward width that the published models really have: floor(8h/3/64)·64 (the listed width is not used)."""
    return 8 * hidden_size // 3 // 64 * 64


@dataclass(frozen=True)
class Shape(ModelConfig):
    """Everything that the layers of a model are built from: the flags, with every size known (in channels, heads, tokens and
    rows)."""

    num_layers: int = field(kw_only=True)
    hidden_size: int = field(kw_only=True)
    num_attention_heads: int = field(kw_only=True)
    num_query_groups: int = field(kw_only=True)
    kv_channels: int = field(kw_only=True)
    ffn_hidden_size: int = field(kw_only=True)
    max_position_embeddings: int = field(kw_only=True)
    padded_vocab_size: int = field(kw_only=True)

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
        channels = flags.kv_channels or preset.get("kv_channels")
        require(
            channels or hidden % heads == 0,
            f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}",
            "channels per head must be a whole number",
            "change one of them or pass --kv-channels",
        )
        sizes = {
            "num_layers": _known("num_layers", flags.num_layers, preset),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": flags.num_query_groups or heads,
            "kv_channels": channels or hidden // heads,
            "ffn_hidden_size": ffn,
            "max_position_embeddings": flags.max_position_embeddings or flags.seq_length,
            "padded_vocab_size": padded_vocab_size,
        }
        return cls(**{**asdict(flags), **sizes})

    @classmethod
    def of(cls, recorded: ModelConfig) -> Shape:
        """The shape that a record, a checkpoint or a converted configuration describes: every size is in it.

        Raises:
            UserError: the rows of the embedding are not.
        """
        rows = recorded.padded_vocab_size or 0
        require(rows, "the model has no padded_vocab_size", "a record holds every size", "give --padded-vocab-size")
        return cls.from_flags(recorded, padded_vocab_size=rows)

    def recorded(self) -> ModelConfig:
        """The model section of a run's record: the flags with every size filled in."""
        return ModelConfig(**asdict(self))


def _preset(name: str | None) -> dict[str, int]:
    if name is None:
        return {}
    names = {preset.lower(): preset for preset in PRESETS}
    near = "" if name.lower() in names else import_module("megatron.config.usage").suggestion(name, PRESETS, cutoff=0.5)
    require(
        name.lower() in names,
        f"--model {name!r} is not a preset",
        "--help presets lists them: 7M, 14M, ... 16183M",
        f"{near or 'choose one of them'} or give --num-layers, --hidden-size and --num-attention-heads",
    )
    return PRESETS[names[name.lower()]]._asdict()


def _known(name: str, value: int | None, preset: dict[str, int]) -> int:
    known, flag = value or preset.get(name, 0), flag_of(name)
    require(known, f"the model has no {flag}", "a model needs a preset or explicit sizes", f"pass --model 7M or {flag}")
    return known


def padded_size(vocab_size: int, *, multiple: int, tp_size: int) -> int:
    """Rows of the embedding matrix: the vocabulary, padded to ``multiple``.

    The same for every tensor-parallel size that divides ``multiple`` (1, 2, 4, … 128 for the default), because padding
    rows take part in the softmax: a model must not depend on the layout. Megatron pads to ``multiple · tp_size``. Other
    sizes pad to the next number that they divide.
    """
    rows = -(-vocab_size // multiple) * multiple
    return -(-rows // tp_size) * tp_size
