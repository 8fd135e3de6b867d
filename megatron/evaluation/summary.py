"""What the estimates of an evaluation were, per task: kind, estimator, draws, passes, error."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from megatron.evaluation.scorer import Estimate


@dataclass
class TaskSummary:
    """Sums over the estimates of one task."""

    labels: set[str] = field(default_factory=set)
    number: int = 0
    passes: int = 0
    draws: int = 0
    squared_errors: float = 0.0
    number_with_error: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        error = math.sqrt(self.squared_errors / self.number_with_error) if self.number_with_error else None
        return {
            "estimator": "; ".join(sorted(self.labels)),
            "answers": self.number,
            "passes_per_answer": self.passes / max(self.number, 1),
            "draws_per_answer": self.draws / max(self.number, 1),
            "rms_standard_error_nats": error,
        }


class EstimateSummary:
    """Collects estimates by task."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskSummary] = defaultdict(TaskSummary)

    def add(self, task: str, estimate: Estimate) -> None:
        """Count one estimate."""
        own = self.tasks[task]
        own.labels.add(f"{estimate.kind}: {estimate.estimator}")
        own.number += 1
        own.passes += estimate.num_passes
        own.draws += estimate.num_draws
        if math.isfinite(estimate.standard_error):
            own.squared_errors += estimate.standard_error**2
            own.number_with_error += 1

    def merge(self, others: list[EstimateSummary]) -> EstimateSummary:
        """The sum of the summaries of several ranks."""
        total = EstimateSummary()
        for other in others:
            for name, task in other.tasks.items():
                own = total.tasks[name]
                own.labels |= task.labels
                for count in ("number", "passes", "draws", "squared_errors", "number_with_error"):
                    setattr(own, count, getattr(own, count) + getattr(task, count))
        return total

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """JSON values by task name."""
        return {name: task.as_dict() for name, task in sorted(self.tasks.items())}
