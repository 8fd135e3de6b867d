"""The average of the weights: by hand, from saved weights, and wherever its weights may be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.checkpoint.reader import CheckpointReader
from megatron.training.shards import Average

STEPS = 8


def test_updates_by_hand() -> None:
    """From 1, with weights 2, 3, 4: d = 1/10, 2/11 and min(0.2, 3/12). A step that was skipped is none."""
    weights, taken = torch.tensor([1.0]), torch.tensor(False)
    average = Average([weights], 0.2)
    for value, expected in ((2.0, 1.9), (3.0, 2.8), (4.0, 0.2 * 2.8 + 0.8 * 4)):
        weights.fill_(value)
        average.update(taken)
        assert float(average.of(weights)) == pytest.approx(expected, abs=1e-6)
        before = average.of(weights).clone()
        average.update(~taken)
        assert average.of(weights).equal(before)
    assert average.num_updates == 3
    average.restart()
    assert (float(average.of(weights)), average.num_updates) == (4.0, 0)


@pytest.mark.parametrize(
    ("decay", "updates"), [(0.9999, 10**9), (0.999999, 10**9), (0.9999999, 10**9), (1 - 1e-9, 10**7)]
)
def test_a_long_window_has_its_length(decay: float, updates: int) -> None:
    """The share of the newest weights is 1 − d itself: taken from d in fp32 it was off by 1.3 % at 0.999999 and 19 % at
    0.9999999, and by 0.7 % in the ramp after 10⁷ updates."""
    weights = torch.tensor([0.0])
    average = Average([weights], decay)
    average.num_updates.fill_(updates)
    average.update((weights.fill_(1.0) < 0).squeeze())
    assert float(average.of(weights)) == pytest.approx(max(1 - decay, 9 / (10 + updates)), rel=1e-6)


def test_exchange_and_back_is_exact_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.training.shards.EXCHANGED", 2)
    weights = torch.nn.Parameter(torch.tensor([[1 / 3, 2.0, 5.0], [7.0, 8.0, 9.0]]))
    average = Average([weights], 0.9)
    with torch.no_grad():
        weights.add_(0.1)
    places, trained, own = (
        (weights.data_ptr(), average.of(weights).data_ptr()),
        weights.detach().clone(),
        average.of(weights).clone(),
    )
    average.exchange()
    assert weights.equal(own) and average.of(weights).equal(trained)
    average.exchange()
    assert weights.equal(trained) and average.of(weights).equal(own)
    assert (weights.data_ptr(), average.of(weights).data_ptr()) == places


@pytest.fixture(scope="module")
def run(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps an average and saves every step."""
    folder = tmp_path_factory.mktemp("averaged")
    train(pools, token_files, folder, save_interval=1, ema_decay=0.3)
    return folder


def train(pools: Callable[[int], WorkerPool], tokens: Path, save: Path | None, **changes: Any) -> tuple[int, str]:
    """Status and output of a short run."""
    common = {"train_iters": STEPS, "valid_data_path": tokens / "valid", "eval_iters": 2, "lr": 1e-2}
    (trace,) = pools(1).run(jobs.train, "mdm", jobs.flags(tokens, save, **{**common, **changes}))
    return trace.status, pools(1).output(0)


def read(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run / f"global_step{step}")
    return {name: reader.tensor(name, kind).double() for name in reader.specs}


def test_it_follows_from_the_weights_of_every_step(run: Path) -> None:
    average = read(run, 1, "ema")
    for step in range(2, STEPS + 1):
        kept = min(0.3, step / (9 + step))
        average = {name: kept * average[name] + (1 - kept) * own for name, own in read(run, step, "weight").items()}
        for name, saved in read(run, step, "ema").items():
            torch.testing.assert_close(saved, average[name], atol=1e-6, rtol=0)


def test_an_evaluation_of_the_average_repeats_its_row(pools: Callable, token_files: Path, run: Path) -> None:
    row = jobs.records(run, "valid_ema")[STEPS]
    status, output = train(pools, token_files, None, load=run, skip_train=True, load_kind="ema")
    assert status == 0 and "loaded averaged weights of" in output
    assert f"of the averaged weights {row['nll']:.4f} ±" in output
    assert f"{row['nll']:.4f}" != f"{jobs.records(run, 'valid')[STEPS]['nll']:.4f}"
    assert (run / "evaluations").is_dir() and (run / row["sums"]).is_file()


def test_a_run_may_start_from_the_average(pools: Callable, token_files: Path, run: Path, tmp_path: Path) -> None:
    """The first step of a warm-up has rate 0, so the first checkpoint holds what was loaded."""
    more = {"train_iters": 1, "lr_warmup_samples": 8, "lr_decay_samples": 80}
    status, _ = train(pools, token_files, tmp_path, load=run, finetune=True, load_kind="ema", **more)
    average, trained = read(run, STEPS, "ema"), read(run, STEPS, "weight")
    assert status == 0 and list(jobs.records(tmp_path, "valid")) == [1] and not jobs.records(tmp_path, "valid_ema")
    for name, tensor in read(tmp_path, 1, "weight").items():
        assert tensor.equal(average[name]) and not tensor.equal(trained[name])


def test_what_cannot_be_is_refused_in_words(pools: Callable, token_files: Path, run: Path, tmp_path: Path) -> None:
    status, output = train(pools, token_files, tmp_path / "plain")
    assert status == 0
    refusals = {
        "has no averaged weights (ema)": {"load": tmp_path / "plain", "skip_train": True, "load_kind": "ema"},
        "--load-kind would have no effect": {"load": run, "save": run, "load_kind": "ema"},
        "optimizer.ema_decay 0.3 → 0.5": {"load": run, "save": run, "ema_decay": 0.5},
        "--ema-decay is 1.0": {"ema_decay": 1.0},
    }
    for words, changes in refusals.items():
        status, output = train(pools, token_files, changes.pop("save", tmp_path / "new"), **changes)
        assert status == 2 and words in output and "Traceback" not in output, output


def test_an_average_that_begins_late_starts_from_the_weights(
    pools: Callable, token_files: Path, tmp_path: Path
) -> None:
    assert train(pools, token_files, tmp_path, train_iters=3, lr_decay_samples=80)[0] == 0
    more = {"load": tmp_path, "change_settings": True, "train_iters": 4, "lr_decay_samples": 80, "ema_decay": 0.9}
    assert train(pools, token_files, tmp_path, **more)[0] == 0
    manifest = CheckpointReader(tmp_path / "global_step4").manifest
    assert (manifest["average_updates"], manifest["optimizer_steps"]) == (1, 4)
    before, after = read(tmp_path, 3, "weight"), read(tmp_path, 4, "weight")
    for name, tensor in read(tmp_path, 4, "ema").items():
        torch.testing.assert_close(tensor, 0.1 * before[name] + 0.9 * after[name], atol=1e-6, rtol=0)
