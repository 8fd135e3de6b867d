"""Where a run is: counted in samples and tokens that were trained on, never derived from steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.errors import Failure
from megatron.model.arithmetic import training_flops
from megatron.runs.record import ValidRow


@dataclass
class Progress:
    """Everything that a checkpoint needs besides tensors.

    Attributes:
        step: optimizer steps made, skipped ones included.
        consumed_samples: samples of the training stream consumed.
        tokens: tokens trained on, whatever the sequence length was when.
        tokens_before, epochs_before: where the training data were last changed, and how often they had been seen by then.
        skipped_steps: steps skipped for a NaN or infinite gradient, in the whole run.
        skipped_in_a_row: the same, since the last good step.
        loss_sum, loss_count: losses since the last log line, so that a resumed run prints the same line.
        best_step, best_nll, best_text: best validation so far, with its label and error.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    tokens_before: int = 0
    epochs_before: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_step: int | None = None
    best_nll: float | None = None
    best_text: str = ""

    @classmethod
    def of(cls, manifest: dict[str, Any], *, unique_tokens: int) -> Progress:
        """Where a checkpoint stopped.

        Args:
            manifest: of the checkpoint, of this version or an earlier one.
            unique_tokens: of the training data from now on; epochs of other data are kept.
        """
        known = {item.name: manifest[item.name] for item in fields(cls) if item.name in manifest}
        progress = cls(**known)
        if "tokens" not in manifest:
            progress.tokens = progress.consumed_samples * manifest["config"]["model"]["seq_length"]
        before = manifest.get("unique_tokens", unique_tokens)
        if before != unique_tokens:
            progress.epochs_before = progress.epoch(before)
            progress.tokens_before = progress.tokens
        return progress

    def epoch(self, unique_tokens: int) -> float:
        """How often the training data were seen; 0 without any."""
        return self.epochs_before + (self.tokens - self.tokens_before) / unique_tokens if unique_tokens else 0.0

    def position(self, *, unique_tokens: int, parameters: int) -> dict[str, Any]:
        """The fields that every row of metrics.jsonl begins with.

        Args:
            unique_tokens: tokens of one epoch.
            parameters: N of C = 6·N·D.
        """
        return {
            "step": self.step,
            "samples": self.consumed_samples,
            "tokens": self.tokens,
            "epoch": self.epoch(unique_tokens),
            "flops": training_flops(parameters, self.tokens),
        }

    def advance(self, *, samples: int, tokens: int) -> None:
        """One more step is on its way."""
        self.step += 1
        self.consumed_samples += samples
        self.tokens += tokens

    def count_skip(self, skipped: bool, *, limit: int) -> None:
        """Note whether a step was skipped.

        Raises:
            Failure: more than ``limit`` in a row were.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps += int(skipped)
        if self.skipped_in_a_row > limit:
            raise Failure(
                f"{self.skipped_in_a_row} steps in a row had a NaN or infinite gradient",
                f"a run that diverges ends (--max-skipped-steps {limit})",
                "resume from an earlier checkpoint with a lower --lr",
            )

    def remember_best(self, row: ValidRow | None, text: str) -> None:
        """Keep a validation as the best one, or that there is none."""
        self.best_step, self.best_nll = (None, None) if row is None else (row.step, row.nll)
        self.best_text = text

    def to_manifest(self) -> dict[str, Any]:
        """Fields of a checkpoint's manifest."""
        return asdict(self)
