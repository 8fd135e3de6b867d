"""The optimizer over groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from typing import Any, Protocol

import torch

from megatron.config.schema import OptimizerConfig
from megatron.parallel.sharding import shard_of

# The quintic of Jordan's post: the steepest at zero that leaves every singular value between about 0.7 and 1.2 in five steps.
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def is_hidden_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon trains it: a matrix of a block. Embeddings and head are tables of rows, norms and biases vectors."""
    record = shard_of(parameter)
    return len(record.spec.full_shape) == 2 and record.name.startswith("layers.")


def orthogonal(matrix: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """``U·Vᵀ`` of a matrix ``U·S·Vᵀ``, nearly: the Newton–Schulz iteration ``X ← a·X + (b·A + c·A²)·X`` with ``A = X·Xᵀ``.

    In bf16 it is bit for bit that of ``torch.optim.Muon``, which knows no other type.

    Args:
        matrix: [A, B].
        steps: of the iteration.
        dtype: in which it runs, and of what is returned, [A, B].
    """
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class WholeMatrices(Protocol):
    """Brings together the matrices of which every process holds pieces."""

    def apply(
        self, flat: torch.Tensor, values: torch.Tensor, function: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> torch.Tensor:
        """``function`` of the whole matrices of a partition, for which ``values`` stand; this process' part of it, flat."""


class AdamW(torch.optim.AdamW):
    """torch's own, without its guards against being compiled: each of them loads the compiler, a second at every start."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class MuonAdamW(AdamW):
    """Muon (Jordan, 2024: https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, AdamW for all else.

    One step: ``M ← β·M + (1 − β)·G``, ``U = (1 − β)·G + β·M`` with Nesterov, ``W ← (1 − lr·decay)·W − lr·s·NS(U)``.

    NS is :func:`orthogonal` of whole matrices: in bf16 where the model computes in it, else in fp32, whose layouts agree to
    rounding. ``s`` is sqrt(max(A, B)) (spectral) or sqrt(max(1, A/B)) (shape_scaling), times the extra factor; with spectral
    and 0.2 an update has the RMS of AdamW's and takes its rate and decay (Liu et al., arXiv 2502.16982, eq. 4).

    Attributes:
        matrices: set when the partitions stand.
    """

    matrices: WholeMatrices

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, **adam: Any) -> None:
        """Args:
        groups: of the model's parameters; those with ``momentum`` among their ``moments`` are trained by Muon.
        config: the settings of Muon.
        adam: options of AdamW.
        """
        super().__init__(groups, **adam)
        self.config = config
        model_dtype = self.param_groups[0]["params"][0].dtype  # fp32 masters take their place later
        self.dtype = torch.float32 if model_dtype == torch.float32 else torch.bfloat16

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
        flat.add_(self.matrices.apply(flat, update, self._updates), alpha=group["lr"])

    def _updates(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """−s·NS(U) of each, [A, B], of its own type."""
        config, is_spectral = self.config, self.config.muon_scale_mode == "spectral"
        updates = []
        for matrix in matrices:
            rows, columns = matrix.shape
            scale = math.sqrt(max(rows, columns) if is_spectral else max(1, rows / columns))
            whole = orthogonal(matrix, config.muon_num_ns_steps, self.dtype).to(matrix.dtype)
            updates.append(whole * (-scale * config.muon_extra_scale_factor))
        return updates


# What an optimizer keeps for every weight: kinds of a checkpoint, and of its own state.
ADAM, MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)
MOMENTS = (*ADAM, *MUON)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), or Muon for the matrices of the blocks and
    AdamW for the rest.

    Matrices are decayed, the embedding among them; one-dimensional tensors (norms, biases) are not. Each group says under
    ``moments`` what is kept for every weight of it.
    """
    parameters, is_muon = list(parameters), config.optimizer == "muon"
    hidden = {p for p in parameters if is_muon and is_hidden_matrix(p)}
    decayed = [p for p in parameters if p.dim() > 1 and p not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p in hidden], "weight_decay": config.weight_decay, "moments": MUON},
        {"params": decayed, "weight_decay": config.weight_decay, "moments": ADAM},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "moments": ADAM},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optimizer == "fusedadam":
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        return FusedAdam(groups, adam_w_mode=True, **options)
    if is_muon:
        return MuonAdamW(groups, config, fused=True, **options)
    return AdamW(groups, fused=True, **options)
