"""Validation: the same samples and noise whenever and wherever it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.config.schema import EXACT_COUNT
from megatron.data.dataset import GPTDataset
from megatron.data.loader import Packing
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.objectives.ar import Autoregressive
from megatron.objectives.mdm import MaskedDiffusion
from megatron.training.stop import STOPPED_STATUS
from megatron.training.validation import Validator

MDM = MaskedDiffusion(mask_token_id=90, global_batch_size=8, seed=1)


@pytest.fixture(scope="module")
def trained(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a validation and a checkpoint at steps 3 and 6."""
    run_dir = tmp_path_factory.mktemp("trained")
    options = {"train_iters": 6, "save_interval": 3, "eval_interval": 3, "eval_iters": 2, "hidden_dropout": 0.1}
    argv = jobs.flags(token_files, run_dir, valid_data_path=token_files / "valid", **options)
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    return run_dir


@pytest.fixture
def validate(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, trained: Path
) -> Callable[..., dict[str, Any]]:
    """``validate(size, **flags)``: the record of a run that only validates."""

    def run(size: int = 1, save: Path | None = None, **changes: Any) -> dict[str, Any]:
        run_dir = save or tmp_path / f"validation{len(list(tmp_path.iterdir()))}"
        options = {"load": trained, "skip_train": True, "train_iters": None, "train_data_path": None, "eval_iters": 2}
        argv = jobs.flags(token_files, run_dir, **{**options, "valid_data_path": token_files / "valid", **changes})
        traces = pools(size).run(jobs.train, "mdm", argv)
        assert [trace.status for trace in traces] == [0] * size, pools(size).output(0)
        newest = max((run_dir / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())["result"]

    return run


def test_it_repeats_what_training_found(validate: Callable, trained: Path) -> None:
    """Also with dropout configured, which validation must turn off, and another seed, which it must ignore."""
    logged = jobs.records(trained, "valid")
    for step, seed in ((3, 1234), (6, 99)):
        record = validate(load_tag=f"global_step{step}", seed=seed, hidden_dropout=0.1)
        assert record["step"] == step
        assert (record["nll"], record["nll_se"]) == (logged[step]["nll"], logged[step]["nll_se"])
    assert logged[3]["nll"] != logged[6]["nll"]


@pytest.mark.parametrize(
    ("size", "layout"), [(2, {"micro_batch_size": 2}), (2, {"pp_size": 2}), (4, {"tp_size": 2, "zero_stage": 1})]
)
def test_the_whole_set_in_any_layout(validate: Callable, size: int, layout: dict[str, Any]) -> None:
    """Every sample once, although their number is not a multiple of ranks times micro-batch."""
    expected, record = validate(1, eval_iters="full", micro_batch_size=1), validate(size, eval_iters="full", **layout)
    assert record["num_samples"] == expected["num_samples"]
    assert expected["num_samples"] % 4 != 0
    for name in ("nll", "nll_se"):
        assert record[name] == pytest.approx(expected[name], abs=1e-6)


def test_a_rank_whose_last_pass_holds_no_sample_of_the_set(
    validate: Callable, token_files: Path, tmp_path: Path
) -> None:
    """17 samples on two ranks: the second one's ninth micro-batch, a pass of its own, lies past the end."""
    with IndexedDatasetWriter(tmp_path / "few", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(17 * 32 + 1) % 499, np.array([50] * 10 + [45]))
        writer.close(None)
    expected, record = (
        validate(size, eval_iters="full", micro_batch_size=1, valid_data_path=tmp_path / "few") for size in (1, 2)
    )
    assert record["num_samples"] == expected["num_samples"] == 17
    assert record["nll"] == pytest.approx(expected["nll"], abs=1e-6)


def test_the_estimator_is_chosen_and_recorded(validate: Callable, trained: Path) -> None:
    """Pairs of exact counts, or coins: two estimates of one number, the second with the larger error."""
    counts, coins = (
        validate(num_mc=2, eval_iters="full"),
        validate(num_mc=2, eval_iters="full", valid_estimator="bernoulli"),
    )
    assert (counts["estimator"], coins["estimator"]) == ("exact-count-antithetic", "bernoulli")
    assert coins["nll_se"] > 1.3 * counts["nll_se"]
    assert abs(coins["nll"] - counts["nll"]) < 3 * math.hypot(coins["nll_se"], counts["nll_se"])
    assert json.loads((trained / "run.json").read_text())["config"]["run"]["valid_estimator"] == counts["estimator"]
    assert json.loads((trained / "best.json").read_text())["estimator"] == counts["estimator"]


def test_more_draws_measure_the_same_more_precisely(validate: Callable) -> None:
    one, many = validate(num_mc=1, eval_iters=4), validate(num_mc=8, eval_iters=4)
    assert (one["num_mc"], many["num_mc"]) == (1, 8)
    assert many["nll_se"] < 0.9 * one["nll_se"]
    assert abs(many["nll"] - one["nll"]) < 4 * math.hypot(one["nll_se"], many["nll_se"])
    assert many["label"] == "NLL bound"


def test_what_only_a_training_heeds_is_named(validate: Callable, tmp_path: Path, pools: Callable) -> None:
    """Each once; also what is idle for another reason. The flags that an evaluation heeds are not among them."""
    flags = {"tensorboard_dir": tmp_path / "events", "exit_interval": 3, "ema_decay": 0.9, "lr": 0.1, "train_iters": 5}
    flags |= {"save_best": True, "keep_last": 2, "async_save": True, "overwrite": True, "no_load_rng": True}
    validate(**flags, hidden_dropout=0.2, log_interval=7, seed=7, num_mc=2, exit_duration_in_mins=9)
    (line,) = (line for line in pools(1).output(0).splitlines() if line.startswith("without effect here"))
    named = [*flags, "hidden_dropout", "log_interval"]
    assert " (needs no --skip-train)" in line
    for name in named:
        assert line.count(f"--{name.replace('_', '-')}") == 1, (name, line)
    assert not [name for name in ("seed", "num-mc", "exit-duration-in-mins", "eval-iters") if f"--{name}" in line]
    assert not (tmp_path / "events").exists()


def test_the_kill_switch_stops_a_validation(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, trained: Path
) -> None:
    (tmp_path / "stop").touch()
    options = {"load": trained, "skip_train": True, "train_iters": None, "train_data_path": None}
    options |= {"valid_data_path": token_files / "valid", "kill_switch_file": tmp_path / "stop"}
    trace = pools(1).run(jobs.train, "mdm", jobs.flags(token_files, tmp_path / "run", **options))[0]
    assert trace.status == STOPPED_STATUS and f"stopped by the kill-switch file {tmp_path}/stop" in pools(1).output(0)


def test_validating_changes_nothing_in_the_run(validate: Callable, trained: Path) -> None:
    """``--save`` at the run itself and an older tag: a record of its own, and everything else as it was."""
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert validate(save=trained, load_tag="global_step3")["step"] == 3
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert {path.parent.name for path in after.keys() - before.keys()} == {"evaluations"}
    assert {path: after[path] for path in before} == before


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    """Tokens that count upwards, in documents of several lengths: a sample holds parts of several."""
    sizes = [5, 1, 12, 20, 3, 9, 7, 2]
    with IndexedDatasetWriter(str(tmp_path / "counted"), np.int32) as writer:
        writer.add_documents(np.arange(sum(sizes)), np.array(sizes))
        writer.close(None)
    return GPTDataset(str(tmp_path / "counted"), None, 8, seed=1)


@pytest.mark.parametrize("has_eod", [False, True])
@pytest.mark.parametrize(
    "objective",
    [Autoregressive(), MDM.for_eval(1, 2), replace(MDM, shifted=True).for_eval(0, 1)],
    ids=["ar", "mdm", "shifted mdm"],
)
def test_each_loss_is_booked_to_the_document_of_its_label(dataset: GPTDataset, objective: Any, has_eod: bool) -> None:
    """Every label costs its own id here, so that a sum says which labels are in it; the last sample is no sample of the set."""
    validator, eod_id = Validator.__new__(Validator), int(dataset[2][3]) if has_eod else None
    validator._dataset, validator._packing = dataset, Packing(eod_id=eod_id)
    validator.plan = SimpleNamespace(settings=SimpleNamespace(run=SimpleNamespace(valid_estimator=EXACT_COUNT)))
    indices = np.array([2, 0, len(dataset)])
    tokens = np.stack([dataset[0 if index == len(dataset) else index] for index in indices])
    shift = objective.decoding.shift
    labels = tokens[:, shift : shift + 8]
    weights = objective.token_weights(indices, 8)
    expected: dict[tuple[int, int], list[float]] = {}
    for row, index in enumerate(indices[:2].tolist()):
        documents = dataset.pieces(index).documents
        for place in range(8):
            if tokens[row, place] != eod_id:
                own = expected.setdefault((index, int(documents[place + shift])), [0, 0.0, 0.0])
                own[0] += 1
                own[1] += labels[row, place]
                own[2] += weights[row, place] - 1
    sample, document, counts, loss, excess = validator._sums(indices, labels.astype(float), objective)
    found = {
        (int(s), int(d)): [int(n), float(x), pytest.approx(float(e), abs=1e-6)]
        for s, d, n, x, e in zip(sample, document, counts, loss, excess)
    }
    assert found == expected and len({document for _, document in expected}) > 2
