"""Training objectives. A new one is one file here, one line in :data:`OBJECTIVES` and one test file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module

from megatron import config
from megatron.config.option import spelling
from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME, Config, ObjectiveConfig
from megatron.errors import UserError, require
from megatron.objectives.base import Objective, Setting


class Registry(Mapping[str, type[Objective]]):
    """Objectives by name, each imported when it is asked for: a run needs its own and no other.

    Attributes:
        places: name → module of this package and class.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> type[Objective]:
        module, _, cls = self.places[name].partition(".")
        return getattr(import_module(f"megatron.objectives.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


OBJECTIVES = Registry(
    {
        "ar": "ar.Autoregressive",
        "mdm": "mdm.MaskedDiffusion",
        "permuted_ar": "permuted_ar.PermutedAR",
        "masked_attention_ar": "masked_attention_ar.MaskedAttentionAR",
        "masked_input_ar": "masked_input_ar.MaskedInputAR",
        "mir_ar": "mir_ar.MaskedInputRegularizedAR",
        "augmented_ar": "augmented_ar.AugmentedAR",
        "maskgit": "maskgit.MaskGIT",
        "exact_count_mdm": "exact_count.ExactCountMDM",
        "block_diffusion": "block_diffusion.BlockMaskedDiffusion",
        "uniform_diffusion": "uniform_diffusion.UniformDiffusion",
        "dual": "dual.Dual",
    }
)


def parse(argv: Sequence[str] | None = None, **arguments: object) -> Config:
    """:func:`megatron.config.parse` with the objectives that are there."""
    return config.parse(argv, OBJECTIVES, **arguments)  # type: ignore[arg-type]


def build_objective(settings: Config, *, scheme: int = NOISE_SCHEME) -> Objective:
    """The objective of a run.

    Args:
        settings: flags or record of the run; options that the objective does not have are passed over.
        scheme: of the noise.

    Raises:
        UserError: no such objective, or options that do not fit.
    """
    name, run = str(settings.objective.objective), settings.run
    if name not in OBJECTIVES:
        raise UserError(
            f"--objective {name!r} is not known",
            f"an objective is one of {', '.join(OBJECTIVES)}",
            "correct the name or add it to megatron/objectives",
        )
    cls = OBJECTIVES[name]
    given = settings.objective.options
    options = cls.Options(**{item.name: given[item.name] for item in fields(cls.Options) if item.name in given})
    setting = Setting(
        seed=run.seed,
        global_batch_size=run.global_batch_size or run.micro_batch_size,
        seq_length=settings.model.seq_length,
        mask_token_id=settings.objective.mask_token_id,
        scheme=scheme,
        valid_estimator=run.valid_estimator or EXACT_COUNT,
        padded_vocab_size=settings.model.padded_vocab_size,
    )
    return cls.build(options, setting)


def with_vocabulary(flags: ObjectiveConfig, mask_id: int | None, *, size: int, padded: int) -> ObjectiveConfig:
    """The flags of an objective with what follows from the vocabulary.

    Args:
        flags: as given.
        mask_id: row of the mask token.
        size: tokens before padding.
        padded: rows of the embedding.

    Raises:
        UserError: a vocabulary was given that does not hold all tokens, or more than there are rows.
    """
    filled = dict(flags.options)
    for item in (item for item in fields(OBJECTIVES[str(flags.objective)].Options) if item.metadata["follows"]):
        given = filled[item.name] = size if filled.get(item.name) is None else filled[item.name]
        shown = f"{spelling(item)} {given} with a vocabulary of {size} tokens and {padded} rows"
        require(size <= given <= padded, shown, "it holds every token, and each has a row", "leave it out")
    return replace(flags, mask_token_id=mask_id, options=filled)


def needs_mask_token(name: str | None) -> bool:
    """Whether the vocabulary must have room for a mask token."""
    return name is not None and name in OBJECTIVES and OBJECTIVES[name].needs_mask_token
