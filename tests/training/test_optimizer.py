"""Muon over flat partitions, whole matrices at a time, as torch's; AdamW on the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import OptimizerConfig
from megatron.training.optimizer import COEFFICIENTS, MuonAdamW, orthogonal

SHAPES = ((6, 4), (4, 8))
SCALES = {("spectral", 0.2): "match_rms_adamw", ("shape_scaling", 1.0): "original"}


class Stacked:
    """The matrices of one flat partition of one process."""

    def apply(
        self, flat: torch.Tensor, values: torch.Tensor, function: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> torch.Tensor:
        parts = values.split([rows * columns for rows, columns in SHAPES])
        made = function([part.view(shape) for part, shape in zip(parts, SHAPES)])
        return torch.cat([matrix.reshape(-1) for matrix in made])


@pytest.mark.parametrize("shape", [(8, 8), (24, 5), (5, 24), (1, 7)])
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_the_iteration_is_torchs_in_bf16_and_the_polynomial_of_the_singular_values_in_fp32(
    shape: tuple[int, int], steps: int
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs = torch.nn.Parameter(torch.zeros(shape))
    theirs.grad = matrix.clone()
    options = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "original"}
    torch.optim.Muon([theirs], lr=1 / math.sqrt(max(1, shape[0] / shape[1])), ns_steps=steps, **options).step()
    torch.testing.assert_close(orthogonal(matrix, steps, torch.bfloat16).float(), -theirs.detach(), atol=0, rtol=1e-6)

    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(steps):
        values = COEFFICIENTS[0] * values + COEFFICIENTS[1] * values**3 + COEFFICIENTS[2] * values**5
    expected = left @ values.diag() @ right
    torch.testing.assert_close(orthogonal(matrix, steps, torch.float32).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_without_a_gradient_has_no_direction(dtype: torch.dtype) -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5), 5, dtype), torch.zeros(3, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_iteration_runs_in_what_the_model_computes_in(dtype: torch.dtype) -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))], "moments": ("momentum",)}
    assert MuonAdamW([group], replace(OptimizerConfig(), optimizer="muon")).dtype == dtype


@pytest.mark.parametrize(("mode", "factor"), list(SCALES))
@pytest.mark.parametrize("nesterov", [True, False])
def test_five_steps_are_those_of_torch(mode: str, factor: float, nesterov: bool) -> None:
    random = torch.Generator().manual_seed(3)
    draws = [[torch.randn(shape, generator=random) for shape in (*SHAPES, (5,))] for _ in range(6)]
    plain = [torch.nn.Parameter(draw.clone()) for draw in draws[0]]
    options = {"lr": 0.02, "weight_decay": 0.3}
    scale = SCALES[mode, factor]
    theirs = torch.optim.Muon(plain[:2], momentum=0.9, nesterov=nesterov, adjust_lr_fn=scale, **options)
    rest = torch.optim.AdamW(plain[2:], betas=(0.9, 0.99), **options)

    flat, vector = (
        torch.nn.Parameter(t) for t in (torch.cat([draw.reshape(-1) for draw in draws[0][:2]]), draws[0][2])
    )
    config = replace(OptimizerConfig(), optimizer="muon", muon_momentum=0.9, muon_nesterov=nesterov)
    config = replace(config, muon_scale_mode=mode, muon_extra_scale_factor=factor)
    groups = [{"params": [flat], "moments": ("momentum",)}, {"params": [vector], "moments": ("exp_avg", "exp_avg_sq")}]
    ours = MuonAdamW(groups, config, betas=(0.9, 0.99), **options)
    ours.matrices, ours.dtype = Stacked(), torch.bfloat16
    for gradients in draws[1:]:
        for parameter, gradient in zip(plain, gradients):
            parameter.grad = gradient.clone()
        flat.grad, vector.grad = torch.cat([g.reshape(-1) for g in gradients[:2]]), gradients[2].clone()
        theirs.step()
        rest.step()
        ours.step()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in plain[:2]])
    torch.testing.assert_close(flat.detach(), expected, atol=1e-6, rtol=0)
    assert vector.equal(plain[2])
    assert set(ours.state[flat]) == {"step", "momentum"} and int(ours.state[flat]["step"]) == 5


def test_matrices_of_the_blocks_have_momentum_and_all_else_moments(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    options = {"train_iters": 2, "untie_embeddings_and_output_weights": True, "no_use_rotary_position_embeddings": True}
    argv = jobs.flags(token_files, tmp_path, optimizer="muon", **options)
    assert pools(1).run(jobs.train, "ar", argv)[0].status == 0
    assert "WARNING" not in pools(1).output(0), "that DeepSpeed has not tested it"
    reader = CheckpointReader(tmp_path / "global_step2")
    kinds = {name: {kind for kind in KINDS if holds(reader, name, kind)} for name in reader.specs}
    hidden = {name for name, own in kinds.items() if own == {"momentum"}}
    assert hidden == {name for name, spec in reader.specs.items() if "layers." in name and len(spec.full_shape) == 2}
    assert len(hidden) == 8
    assert all(own == {"exp_avg", "exp_avg_sq"} for name, own in kinds.items() if name not in hidden)


KINDS = ("momentum", "exp_avg", "exp_avg_sq")


def holds(reader: CheckpointReader, name: str, kind: str) -> bool:
    try:
        return reader.tensor(name, kind) is not None
    except ValueError:
        return False


def test_what_muon_cannot_is_refused_in_words(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    refusals = {
        "--optimizer muon with --cpu-optimizer": {"optimizer": "muon", "cpu_optimizer": True},
        "--muon-momentum would have no effect; it needs --optimizer muon": {"muon_momentum": 0.9},
    }
    for words, changes in refusals.items():
        (trace,) = pools(1).run(jobs.train, "ar", jobs.flags(token_files, tmp_path, **changes))
        assert trace.status == 2 and words in " ".join(pools(1).output(0).split())
