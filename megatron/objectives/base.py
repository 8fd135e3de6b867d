"""The seam between data, objective and model.

Every objective is a weighted cross-entropy: ``loss = Σ loss_weights · ce / normalizer``. Only the preparation of a batch
differs, and that runs on the CPU, in the data loader's workers, without collectives.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from megatron.config.schema import Config
from megatron.model.batch import ModelBatch
from megatron.model.mask import AttentionMask

# What a loss may be called. The mean over noise of a bound is an upper bound on the negative log-likelihood.
EXACT = "NLL (exact)"
BOUND = "NLL bound"
NO_BOUND = "not a likelihood bound"


class Objective(Protocol):
    """What is predicted from what.

    Attributes:
        attention_mask: which keys a query sees: all that the model knows of the objective.
        label: what its loss may be called: :data:`EXACT`, :data:`BOUND` or :data:`NO_BOUND`.
        loss_fraction: expected share of tokens in the loss (for FLOP counts).
        needs_mask_token: whether the vocabulary must have room for a mask token.
    """

    needs_mask_token: ClassVar[bool]

    @property
    def attention_mask(self) -> AttentionMask: ...

    @property
    def label(self) -> str: ...

    @property
    def loss_fraction(self) -> float: ...

    @classmethod
    def from_config(cls, config: Config) -> Objective:
        """Build from a resolved configuration."""
        ...

    def prepare(self, tokens: torch.Tensor, sample_ids: torch.Tensor) -> ModelBatch:
        """Make a batch.

        Args:
            tokens: [batch, seq + 1] int64.
            sample_ids: [batch] int64; all noise is a function of (seed, sample id).
        """
        ...

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Objective:
        """The same objective with evaluation settings: no training-only noise, a fixed seed.

        Args:
            draw: which of the noise draws this is.
            num_draws: how many there are; stratified times spread over them.
        """
        ...


def is_exact(objective: Objective) -> bool:
    """Whether the loss is a likelihood, not a bound on one."""
    return objective.label == EXACT
