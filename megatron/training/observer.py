"""A place to watch a run from, for tests and instruments. The default sees nothing and costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.model.batch import ModelBatch, Targets
    from megatron.training.deepspeed.engine import Engine
    from megatron.training.step import StepResult


class Observer:
    """Callbacks of one rank's run; override those of interest.

    They look and change nothing. What goes on inside the model is seen by hooks on ``engine.module``, which is the plain
    model or this rank's stage of the pipeline.
    """

    def built(self, engine: Engine) -> None:
        """The engine stands, with initial weights and no checkpoint loaded yet."""

    def step_begins(self, engine: Engine, consumed_samples: int) -> None:
        """A training step is about to read its first micro-batch."""

    def batch_read(self, batch: ModelBatch) -> None:
        """The engine took a micro-batch from the loader, for training or for validation."""

    def loss_asked(self, targets: Targets) -> None:
        """The loss of a micro-batch is about to be computed against these targets (last stage only)."""

    def step_ended(self, result: StepResult) -> None:
        """A training step is queued on the device; reading the result waits for it."""
