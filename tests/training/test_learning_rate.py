"""The learning rate against the formula of FACTS section 3, written down here a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from layouts.jobs import Run

from megatron.config.schema import OptimizerConfig
from megatron.errors import UserError
from megatron.objectives import parse
from megatron.training.optimizer import build_optimizer
from megatron.training.plan import Layout, Schedule
from megatron.training.schedule import learning_rate, plan_schedule

W, N, LR, MIN = 100, 1000, 2e-4, 2e-5


def config(style: str = "cosine", warmup: int = W, **more: Any) -> OptimizerConfig:
    lengths = {"lr_warmup_samples": warmup, "lr_decay_samples": N, **more}
    return OptimizerConfig(lr=LR, min_lr=MIN, lr_decay_style=style, **lengths)


@pytest.mark.parametrize("samples", [0, 1, 50, 99, 100])
def test_warm_up_is_linear_from_zero(samples: int) -> None:
    assert learning_rate(samples, config()) == pytest.approx(LR * samples / W, abs=1e-18)


@pytest.mark.parametrize("samples", [101, 256, 550, 999, 1000])
def test_decay_follows_its_curve(samples: int) -> None:
    share = (samples - W) / (N - W)
    cosine = MIN + (LR - MIN) * 0.5 * (1 + math.cos(math.pi * share))
    assert learning_rate(samples, config()) == pytest.approx(cosine, rel=1e-12)
    assert learning_rate(samples, config("linear")) == pytest.approx(LR - (LR - MIN) * share, rel=1e-12)
    assert learning_rate(samples, config("constant")) == LR


@pytest.mark.parametrize("warmup", [0, W])
@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("exponential", lambda x: 2 * 2.0**-x - 1),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("minus_sqrt", lambda x: 1 - x**0.5),
    ],
)
def test_wsd_is_constant_and_then_decays_over_its_last_samples(
    warmup: int, shape: str, left: Callable[[float], float]
) -> None:
    settings = config("WSD", warmup, lr_wsd_decay_samples=200, lr_wsd_decay_style=shape)
    for samples in (warmup, 101, 256, 800):
        assert learning_rate(samples, settings) == LR  # to the bit, whatever --min-lr is
    for samples in (801, 850, 999, 1000):
        expected = MIN + (LR - MIN) * left((samples - 800) / 200)
        assert learning_rate(samples, settings) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(N, settings) == pytest.approx(MIN)
    assert learning_rate(N + 1, settings) == MIN


def test_a_decay_of_no_samples_is_a_step() -> None:
    settings = config("WSD", lr_wsd_decay_samples=0)
    assert [learning_rate(samples, settings) for samples in (N, N + 1)] == [LR, MIN]


def test_the_inverse_square_root_counts_from_the_warm_up() -> None:
    settings = config("inverse-square-root")
    assert [learning_rate(samples, settings) for samples in (50, 100)] == [LR / 2, LR]
    assert learning_rate(400, settings) == pytest.approx(LR / 2, rel=1e-12)
    assert learning_rate(999, settings) == pytest.approx(LR * math.sqrt(100 / 999), rel=1e-12)
    assert learning_rate(N + 1, settings) == MIN
    assert learning_rate(10**5, config("inverse-square-root", lr_decay_samples=10**6)) == MIN  # its floor
    alone = config("inverse-square-root", warmup=0)  # one sample counts as the warm-up
    assert [learning_rate(samples, alone) for samples in (0, 1, 4)] == [LR, LR, LR / 2]


def test_known_points() -> None:
    assert learning_rate(W + (N - W) // 2, config()) == pytest.approx((LR + MIN) / 2)
    assert learning_rate(N, config()) == pytest.approx(MIN)
    assert learning_rate(10 * N, config()) == MIN  # stays there
    assert learning_rate(0, config(warmup=0)) == LR  # without a warm-up the first step counts


@pytest.mark.parametrize("size", [1, 2])
def test_step_k_uses_the_samples_before_it(runs: Callable[..., Run], size: int) -> None:
    """In a real run, with the rate that is logged; step 1 has rate 0, and a step at rate 0 changes no weight."""
    options = {"lr_warmup_samples": 20, "lr_decay_samples": 64, "min_lr": 1e-4, "tp_size": size}
    run = runs("ar", size, **options)
    settings = OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_samples=20, lr_decay_samples=64)
    for step, record in run.train.items():
        assert record["lr"] == learning_rate((step - 1) * 8, settings)
    assert run.train[1]["lr"] == 0 and run.train[10]["lr"] == 1e-4


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    from torch import nn

    parameters = [nn.Parameter(nn.Linear(3, 4).weight), nn.Parameter(nn.Linear(3, 4).bias)]
    optimizer = build_optimizer(parameters, OptimizerConfig(weight_decay=0.1, adam_beta1=0.8, adam_eps=1e-7))
    decayed = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert decayed[0.1] == parameters[:1] and decayed[0.0] == parameters[1:]
    assert optimizer.defaults["betas"] == (0.8, 0.999) and optimizer.defaults["eps"] == 1e-7


def planned(*words: str, consumed: int = 0) -> Schedule:
    """Of a run in global batches of 8 samples of 8 tokens, over 1,004 tokens."""
    shape = ["--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "1", "--seq-length", "8"]
    flags = parse([*shape, "--micro-batch-size", "8", *words], objective="ar")
    before = {"consumed_samples": consumed} if consumed else {}
    layout = Layout(1, 1, 1, 1, 8, 8, 1, "deepspeed")
    return plan_schedule(flags, layout, unique_tokens=1004, before=before, branch=None)


def test_lengths_are_counted_in_samples() -> None:
    assert planned("--train-samples", "20").train_samples == planned("--train-samples", "20").order_samples == 20
    assert planned("--train-iters", "3").train_samples == 24
    assert planned("--train-epochs", "1").train_samples == 126  # 125.5, rounded
    assert planned("--train-samples", "20").optimizer.lr_decay_samples == 20
    fraction = planned("--train-samples", "20", "--lr-warmup-fraction", "0.1", "--lr-decay-samples", "10")
    assert (fraction.optimizer.lr_warmup_samples, fraction.optimizer.lr_decay_samples) == (1, 10)


def test_lengths_that_no_run_can_have_are_refused() -> None:
    assert planned("--train-samples", "8", consumed=8).train_samples == 8  # a finished run
    constant = ("--lr-decay-style", "constant", "--lr-warmup-samples", "20")
    assert planned("--train-samples", "20", *constant).train_samples == 20
    for words, consumed, message in (
        (["--train-samples", "7"], 0, "7 training samples are less than one global batch of 8"),
        (["--train-samples", "16"], 24, "has trained on 24 samples, this run is to end at 16"),
        (["--train-samples", "20", "--lr-warmup-samples", "20"], 0, "leaves nothing of the 20 decay samples"),
    ):
        with pytest.raises(UserError, match=message):
            planned(*words, consumed=consumed)
