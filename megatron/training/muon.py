"""Muon (Jordan, 2024: https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from megatron.config.schema import OptimizerConfig
from megatron.parallel.sharding import shard_of

# Scale of an update [A, B] by Megatron's name: torch's name, and what torch multiplies by besides.
SCALES = {"spectral": ("match_rms_adamw", 0.2), "shape_scaling": ("original", 1.0)}


def is_hidden_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon trains it: a matrix of a block. Embeddings and head are tables of rows, norms and biases vectors."""
    record = shard_of(parameter)
    return len(record.spec.full_shape) == 2 and record.name.startswith("layers.")


class WholeMatrices(Protocol):
    """Brings together the matrices of which every process holds pieces."""

    def apply(
        self, flat: torch.Tensor, values: torch.Tensor, function: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> torch.Tensor:
        """``function`` of the whole matrices of a partition, for which ``values`` stand; this process' part of it, flat."""


class MuonAdamW(torch.optim.AdamW):
    """One step: ``M ← β·M + (1 − β)·G``, ``U = (1 − β)·G + β·M`` with Nesterov, ``W ← (1 − lr·decay)·W − lr·s·NS(U)``.

    NS, the Newton–Schulz iteration that makes a matrix nearly orthogonal, is that of ``torch.optim.Muon``: it runs in bf16, on
    whole matrices. ``s`` is sqrt(max(A, B)) (spectral) or sqrt(max(1, A/B)) (shape_scaling), times the extra factor; with
    spectral and 0.2 an update has the RMS of AdamW's and takes its rate and decay (Liu et al., arXiv 2502.16982, eq. 4).

    Attributes:
        matrices: set when the partitions stand.
    """

    matrices: WholeMatrices

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, **adam: Any) -> None:
        """Args:
        groups: those with ``momentum`` among their ``moments`` are trained by Muon.
        config: the settings of Muon.
        adam: options of AdamW.
        """
        super().__init__(groups, **adam)
        self.config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what ``param_groups`` holds at the moment; DeepSpeed passes one group at a time."""
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if "momentum" in group["moments"] else ():
                if flat.grad is not None:
                    self._step_matrices(flat, group)
        self.param_groups = [group for group in groups if "momentum" not in group["moments"]]
        super().step()
        self.param_groups = groups

    def _step_matrices(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient, beta = self.state[flat], flat.grad, self.config.muon_momentum
        assert gradient is not None
        if not state:  # counted as AdamW does, on the device
            state.update(step=torch.zeros((), device=flat.device), momentum=torch.zeros_like(flat))
        state["step"] += 1
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - beta)
        update = gradient.lerp(momentum, beta) if self.config.muon_nesterov else momentum
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.add_(self.matrices.apply(flat, update, self._orthogonal), alpha=group["lr"])

    def _orthogonal(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """−s·NS(U) of each: what one step of torch's Muon without momentum makes of zeros at a rate of 1."""
        zeros = [torch.nn.Parameter(torch.zeros_like(matrix)) for matrix in matrices]
        for zero, matrix in zip(zeros, matrices):
            zero.grad = matrix
        name, factor = SCALES[self.config.muon_scale_mode]
        torch.optim.Muon(
            zeros,
            lr=self.config.muon_extra_scale_factor / factor,
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            ns_steps=self.config.muon_num_ns_steps,
            adjust_lr_fn=name,
        ).step()
        return [zero.detach() for zero in zeros]
