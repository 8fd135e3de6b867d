"""One run of a sweep: its place, its directory and the flags of its program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.objectives import parse
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
    parameters: int
    vocab_size: int = PAPER_VOCAB_SIZE
    trunk: SweepRun | None = None
    added_share: float = 1.0

    @property
    def flops(self) -> float:
        """Training compute 6*N*D, with the nominal number of unique tokens; of a branch what comes after its trunk."""
        return 6.0 * self.parameters * self.unique_tokens * self.epochs * self.added_share

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
            return parse(self.arguments(), objective=default, world_size=self.replica)
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
