"""One run of a sweep: its place, its directory and the flags of its program."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.model.arithmetic import parameters_for_compute
from megatron.objectives import build_objective, parse, with_vocabulary
from megatron.objectives.base import Objective, compute_per_token
from megatron.scaling.literature import PAPER_VOCAB_SIZE


@dataclass(frozen=True)
class SweepRun:
    """One run: its place in the grid, its directory and the flags of its program (without leading dashes).

    Attributes:
        vocab_size: of the tokenizer.
        trunk: the run that it leaves at a checkpoint; None for a run of its own.
        added_share: of its tokens those that it trains on itself.
    """

    name: str
    objective: str
    model: str
    unique_tokens: int
    epochs: float
    seed: int
    folder: Path
    flags: Mapping[str, Any]
    vocab_size: int = PAPER_VOCAB_SIZE
    trunk: SweepRun | None = None
    added_share: float = 1.0

    @cached_property
    def parameters(self) -> int:
        """Parameters N for compute."""
        return parameters_for_compute(
            Shape.from_flags(self.parsed().model, padded_vocab_size=self.vocab_size), self.vocab_size
        )

    @cached_property
    def compute(self) -> float:
        """FLOPs of a token of data by 6*N*D, as its record will count them: a token that is computed twice counts twice."""
        return compute_per_token(self.parameters, _objective(self.parsed(), self.vocab_size))

    @property
    def flops(self) -> float:
        """Training compute 6*N*D, with the nominal number of unique tokens; of a branch what comes after its trunk."""
        return self.compute * self.unique_tokens * self.epochs * self.added_share

    @property
    def program(self) -> str:
        """The script that trains it."""
        return "pretrain_mdm.py" if self.objective == "mdm" else "pretrain_gpt.py"

    @property
    def replica(self) -> int:
        """Processes that one replica of the model takes."""
        spellings = (("tensor-model-parallel-size", "tp-size"), ("pipeline-model-parallel-size", "pp-size"))
        sizes = [next((self.flags[name] for name in names if name in self.flags), 1) for names in spellings]
        return math.prod(int(str(size)) for size in sizes)

    def parsed(self, place: str = "") -> Config:
        """Its flags as the trainer reads them, for one replica.

        Args:
            place: where they are from, with which an error begins.

        Raises:
            UserError: flags that the trainer would refuse.
        """
        default = "mdm" if self.program == "pretrain_mdm.py" else "ar"
        try:
            config = parse(self.arguments(), objective=default, world_size=self.replica)
            _objective(config, self.vocab_size)
            return config
        except UserError as error:
            raise UserError(f"{place}{error.given}", error.rule, error.fix) from None

    @property
    def stop_file(self) -> Path:
        """What the trainers look for after every step."""
        return self.folder / "stop"

    def arguments(self) -> list[str]:
        """Command-line words after the program. Loading from the run's own directory continues it where it stopped."""
        words = []
        for name, value in self.flags.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False and value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        own = {"save": self.folder, "load": self.folder, "kill-switch-file": self.stop_file}
        return [*words, *(word for name, path in own.items() for word in (f"--{name}", str(path)))]


def _objective(config: Config, vocab_size: int) -> Objective:
    """The objective of flags, with a mask token behind the vocabulary; how many rows there will be is not asked here."""
    known = with_vocabulary(config.objective, vocab_size, size=vocab_size, padded=sys.maxsize)
    return build_objective(replace(config, objective=known))


def name_of(*, objective: str, model: str, unique_tokens: int, epochs: float, seed: int) -> str:
    """Name of a run by its place: "mdm-140M-100M-50ep-seed1234"."""
    return f"{objective}-{model}-{exact_count(unique_tokens)}-{epochs:g}ep-seed{seed}"


def exact_count(count: int) -> str:
    """A count in a name: short where nothing is lost "1.5M", else all digits, so that names cannot collide."""
    for scale, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= scale and count * 100 % scale == 0:
            return f"{count / scale:.10g}{suffix}"
    return str(count)


def dashed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as the command line spells them, without leading dashes."""
    return {str(key).lstrip("-").replace("_", "-"): value for key, value in flags.items()}
