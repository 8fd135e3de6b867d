"""A run with nothing left to decide. Consumers take the part that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import values_of
from megatron.config.schema import Config, OptimizerConfig
from megatron.config.shape import Preset, Shape
from megatron.model.arithmetic import parameters_for_compute
from megatron.objectives import Objective
from megatron.objectives.base import compute_per_token
from megatron.runs.record import Branch, branch_of

WORKED_OUT = "worked out"  # origin of what data, checkpoint and other settings decide


@dataclass(frozen=True)
class Layout:
    """How one global batch is spread over processes: tp · pp · dp = world."""

    world_size: int
    tp_size: int
    pp_size: int
    dp_size: int
    micro_batch_size: int
    global_batch_size: int
    zero_stage: int
    engine: str = "deepspeed"

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    @property
    def runs_as(self) -> int:
        """The ZeRO stage that the engine knows: DeepSpeed 1 to 3, FSDP2, which always cuts the gradients, 2 and 3."""
        return max(self.zero_stage, 1 if self.engine == "deepspeed" else 2)

    @property
    def sharding(self) -> str:
        """Which engine shares out what over data-parallel ranks, for people."""
        name = "ZeRO" if self.engine == "deepspeed" else "FSDP2, ZeRO"
        note = "" if self.runs_as == self.zero_stage else f" (runs as {self.runs_as})"
        return f"{name} {self.zero_stage}{note}"

    def sizes(self) -> dict[str, int | str]:
        """What run.json says of the layout."""
        return {
            "world": self.world_size,
            "tp": self.tp_size,
            "pp": self.pp_size,
            "dp": self.dp_size,
            "micro_batch_size": self.micro_batch_size,
            "zero_stage": self.zero_stage,
            "engine": self.engine,
        }


@dataclass(frozen=True)
class Schedule:
    """Lengths in samples.

    Attributes:
        train_samples: length of training, as given: data order and learning rate are planned with it, as megatron-core
            does; training ends with the last whole global batch.
        order_samples: samples that the data order is planned for: of a branch, those of the run that it left.
        optimizer: the flags with every length of the rate: linear warm-up (a fraction of the decay need not be whole), decay,
            and of the latter what lies at its end for WSD (None for other styles).
    """

    train_samples: int
    order_samples: int
    optimizer: OptimizerConfig


@dataclass(frozen=True)
class Seeds:
    """Seeds of a run.

    Attributes:
        run: of weights and data order.
        noise: of masks, times and dropout; another one after ``--no-load-rng``.
        scheme: version of the noise scheme.
    """

    run: int
    noise: int
    scheme: int


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        tag: checkpoint to load, or None for a fresh start.
        place: folder and tag among which it was chosen, and will be once its files are read; None where nothing is loaded.
        manifest: of that checkpoint, or empty.
        warning: names newer checkpoints that cannot be used, with the reason; None without any.
        is_continued: goes on where the checkpoint stopped; otherwise only weights are taken over.
        with_optimizer: moments are loaded too.
        branch: where the run left another one (``--branch-from``), now or long ago; None for all others.
        weights: kind of the weights to load.
        changed: settings that differ from those at the checkpoint, ``section.name`` → (before, now, what they affect).
    """

    tag: Path | None
    place: tuple[Path, str | None] | None
    manifest: dict[str, Any]
    warning: str | None
    is_continued: bool
    with_optimizer: bool
    branch: Branch | None
    weights: str
    changed: dict[str, tuple[Any, Any, str]]

    @property
    def is_branching(self) -> bool:
        """Whether the run leaves another one now: it is continued, and yet a new run."""
        return self.branch is not None and self.branch != branch_of(self.manifest)


@dataclass(frozen=True)
class Sources:
    """Training and validation data.

    Attributes:
        train, valid: blends as :func:`megatron.data.dataset.build_dataset` takes them; empty where there is none.
        unique_tokens: tokens of one epoch of the training data; 0 without any.
        fingerprints: what the data are, for run.json: prefixes, weights, sizes, digests.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    unique_tokens: int
    fingerprints: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens: ``size`` before padding, and what run.json says of the tokenizer."""

    size: int
    tokenizer: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        settings: the flags with everything filled in: what run.json and checkpoints record.
        shape, layout, schedule, seeds, objective, start, sources, vocabulary: its parts.
        run_dir: where it writes.
        notes: flags without effect, and what else a person should read once.
        origins: where each setting that is not left at its default comes from, by field.
    """

    settings: Config
    shape: Shape
    layout: Layout
    schedule: Schedule
    seeds: Seeds
    objective: Objective
    start: Start
    sources: Sources
    vocabulary: Vocabulary
    run_dir: Path
    notes: tuple[str, ...]
    origins: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """N of C = 6·N·D."""
        return parameters_for_compute(self.shape, self.vocabulary.size)

    @property
    def compute(self) -> float:
        """FLOPs of training on a token, by C = 6·N·D."""
        return compute_per_token(self.parameters, self.objective)


def origins_of(flags: Config, settings: Config, *, given: Mapping[str, str]) -> dict[str, str]:
    """Where each setting that is not left at its default comes from, by field.

    Args:
        flags: as given.
        settings: what they became.
        given: where those that were given come from.
    """
    before, now, default, found = values_of(flags), values_of(settings), values_of(Config()), {}
    default = before | default | {"objective": now["objective"]}  # objectives have options, programs an objective
    preset = f"preset {settings.model.model}" if settings.model.model else ""
    for name, value in now.items():
        if value != before[name] and before[name] == default[name]:  # a file may give what a flag's absence means
            found[name] = preset if preset and name in Preset._fields else WORKED_OUT
        elif name in given:
            found[name] = given[name]
        elif before[name] != default[name]:
            found[name] = "--megatron-defaults"
    return found
