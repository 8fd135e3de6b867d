"""A training program whose last rank raises in step TROUBLE_STEP, without a word to the others."""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron.training.main import main
from megatron.training.step import Observer


class Trouble(Observer):
    """Counts steps and raises."""

    steps = 0

    def step_begins(self, engine: Any, consumed_samples: int) -> None:
        self.steps += 1
        context = engine.context
        if self.steps == int(os.environ["TROUBLE_STEP"]) and context.rank == context.world_size - 1:
            raise KeyError("token 7")


if __name__ == "__main__":
    sys.exit(main("mdm", observer=Trouble()))
