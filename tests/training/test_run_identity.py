"""A run directory belongs to one run, and its records say what was done: settings, data, lengths, attempts, evaluations."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import jobs
from layouts.pool import Process, WorkerPool

from megatron.checkpoint.files import AVERAGED_FROM, read_manifest, write_manifest
from megatron.checkpoint.select import select
from megatron.data.dataset import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.errors import UserError
from megatron.model.batch import Samples
from megatron.objectives import parse
from megatron.parallel.launch import Launch
from megatron.randomness import named_seed
from megatron.runs.reading import load_run
from megatron.runs.record import RunRecord, ValidRow
from megatron.runs.sums import load_sums
from megatron.statistics import mean_loss
from megatron.training.plan import Plan
from megatron.training.resolve import resolve

REPO = Path(__file__).parents[2]
OLD = REPO / "tests/golden/run_v1"
OLD_FLAGS: dict[str, Any] = {
    "num-layers": 2, "hidden-size": 16, "ffn-hidden-size": 32, "num-attention-heads": 2, "seq-length": 16,
    "micro-batch-size": 2, "global-batch-size": 4, "vocab-size": 99, "make-vocab-size-divisible-by": 4,
    "hidden-dropout": 0.1, "attention-dropout": 0.1, "lr": 1e-3, "min-lr": 1e-4, "lr-warmup-samples": 4, "seed": 99,
    "eval-interval": 5, "eval-iters": 2, "save-interval": 5, "train-iters": 10,
}  # fmt: skip
Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path) -> Start:
    """``start(size, **flags)`` runs the program on RUN = tmp_path/run; returns status and output of the first rank."""

    def run(
        size: int = 1, *, objective: str = "mdm", save: Path | None = tmp_path / "run", **changes: Any
    ) -> tuple[int, str]:
        argv = jobs.flags(token_files, save, **changes)
        traces = pools(size).run(jobs.train, objective, argv)
        return traces[0].status, pools(size).output(0)

    return run


def record(run_dir: Path) -> RunRecord:
    found = RunRecord.read(run_dir)
    assert found is not None
    return found


@pytest.mark.parametrize("objective", ["gpt", "mdm"])
def test_a_run_of_the_first_version_goes_on_as_it_would_have(
    pools: Callable[[int], WorkerPool], tmp_path: Path, objective: str
) -> None:
    """Bit for bit, dropout and masks included: under the noise scheme that it began with."""
    shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    run_dir, data = tmp_path / "old" / objective, tmp_path / "old"
    expected = {kind: jobs.records(run_dir, kind) for kind in ("train", "valid")}
    changes = {"num_mc": 2} if objective == "mdm" else {}
    argv = jobs.flags(data, run_dir, load=run_dir, valid_data_path=data / "valid", **{**OLD_FLAGS, **changes})
    assert pools(1).run(jobs.train, {"gpt": "ar"}.get(objective, objective), argv)[0].status == 0, pools(1).output(0)
    assert "continuing at step 5" in pools(1).output(0)
    for step in range(1, 11):
        for name in ("loss", "lr", "grad_norm", "tokens", "epoch", "flops"):
            assert jobs.records(run_dir)[step][name] == expected["train"][step][name], (step, name)
    for step in (5, 10):
        assert jobs.records(run_dir, "valid")[step]["nll"] == pytest.approx(expected["valid"][step]["nll"], rel=1e-6)
    assert record(run_dir).attempts[-1].from_step == 5 and record(run_dir).run_id
    curve = load_run(run_dir)
    assert len(curve.valid) == 2 and curve.valid[0].estimator == ("bernoulli" if objective == "mdm" else "")


def test_another_noise_scheme_is_no_part_of_a_run(tmp_path: Path) -> None:
    """Only weights may be taken along; before, the flag was recorded and the run went on under its own scheme."""
    shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    run_dir = tmp_path / "old/mdm"

    def seeds(*words: str) -> Any:
        argv = jobs.flags(
            tmp_path / "old", None, load=run_dir, **OLD_FLAGS | {"eval_interval": None, "save_interval": None}
        )
        given = parse([*argv, *words], objective="mdm")
        return resolve(given, Launch(), run_name="run").seeds

    with pytest.raises(UserError, match="--noise-scheme 2 in a run that draws by scheme 1"):
        seeds("--save", str(run_dir), "--noise-scheme", "2")
    assert seeds("--save", str(run_dir), "--noise-scheme", "1").scheme == 1
    assert seeds("--save", str(tmp_path / "new"), "--finetune", "--noise-scheme", "2").scheme == 2


def test_reloaded_without_its_seeds_a_run_draws_other_noise_from_then_on(
    pools: Callable[[int], WorkerPool], tmp_path: Path
) -> None:
    shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    run_dir, data = tmp_path / "old/gpt", tmp_path / "old"
    expected = jobs.records(run_dir)

    def argv(**more: Any) -> list[str]:
        return jobs.flags(data, run_dir, load=run_dir, valid_data_path=data / "valid", **{**OLD_FLAGS, **more})

    def seeds(*words: str) -> Any:
        return resolve(parse([*argv(), *words], objective="ar"), Launch(), run_name="run").seeds

    own, other = seeds(), seeds("--no-load-rng")
    assert own.noise == own.run == other.run != other.noise == named_seed(own.run, "reloaded at 20")
    assert pools(1).run(jobs.train, "ar", argv(no_load_rng=True))[0].status == 0, pools(1).output(0)
    assert jobs.records(run_dir)[5]["loss"] == expected[5]["loss"]
    assert jobs.records(run_dir)[6]["loss"] != expected[6]["loss"], "its dropout is another one"
    assert read_manifest(run_dir / "global_step10")["noise_seed"] == other.noise == seeds().noise, "and stays it"


def test_a_mean_of_checkpoints_is_started_from_and_not_continued(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    run_dir = tmp_path / "old/mdm"
    tag = select(run_dir).tag
    assert tag is not None
    write_manifest(tag, {**read_manifest(tag), AVERAGED_FROM: ["global_step4", "global_step5"]})

    def planned(save: Path, **more: Any) -> Plan:
        options = OLD_FLAGS | {"eval_interval": None, "save_interval": None, "load": run_dir, **more}
        return resolve(parse(jobs.flags(tmp_path / "old", save, **options), objective="mdm"), Launch(), run_name="run")

    with pytest.raises(
        UserError, match="is a mean of checkpoints; it belongs to no run; start from it with --finetune"
    ):
        planned(run_dir)
    assert planned(tmp_path / "new", finetune=True).start.tag == tag


@pytest.mark.parametrize(
    ("changes", "estimator", "changed"),
    [
        ({}, "bernoulli", {}),
        ({"valid_estimator": "exact-count-antithetic"}, "exact-count-antithetic",
         {"run.valid_estimator": ("bernoulli", "exact-count-antithetic", "validation")}),
        ({"finetune": True, "save": "new"}, "exact-count-antithetic", {}),
        ({"skip_train": True, "save": None, "save-interval": None, "eval-interval": None}, "exact-count-antithetic", {}),
        ({"load": None, "save": "new"}, "exact-count-antithetic", {}),
        ({"load": None, "save": "new", "valid_estimator": "bernoulli"}, "bernoulli", {}),
    ],
    ids=["goes on", "changes", "finetunes", "evaluates", "new", "new, asked for"],
)  # fmt: skip
def test_a_run_keeps_the_estimator_that_it_began_with(
    tmp_path: Path, changes: dict[str, Any], estimator: str, changed: dict[str, Any]
) -> None:
    """A record from before there was a choice means coins; evaluations and new runs take the estimator of less variance."""
    shutil.copytree(OLD, tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    old = tmp_path / "old"
    options = {**OLD_FLAGS, "num_mc": 2, "load": old / "mdm", "save": old / "mdm", **changes}
    save = options.pop("save")
    save = tmp_path / save if save == "new" else save
    plan = resolve(
        parse(jobs.flags(old, save, valid_data_path=old / "valid", **options), objective="mdm"), Launch(), run_name="x"
    )
    assert plan.settings.run.valid_estimator == estimator
    assert plan.start.changed == changed
    weights = (
        plan.objective.for_eval(0, 2).prepare(Samples(np.ones((9, 17), np.int64), np.arange(9))).targets.loss_weights
    )
    assert np.allclose(weights.sum(axis=1), 16) == (estimator != "bernoulli")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("lr", 5e-3, "optimizer.lr 0.001 → 0.005"), ("weight_decay", 0.5, "optimizer.weight_decay"), ("seed", 7, "run.seed"),
     ("adam_beta2", 0.9, "optimizer.adam_beta2"), ("lr_decay_style", "linear", "optimizer.lr_decay_style"),
     ("noise_schedule", "cosine", "objective.noise_schedule None → cosine"),
     ("seq_length", 16, "model.seq_length 32 → 16"), ("hidden_dropout", 0.2, "model.hidden_dropout"),
     ("reset_attention_mask", True, "data.reset_attention_mask False → True"),
     ("reset_position_ids", True, "data.reset_position_ids")],
)  # fmt: skip
def test_settings_that_change_results_are_refused_unless_asked_for(
    start: Start, tmp_path: Path, name: str, value: Any, shown: str
) -> None:
    """Also for a run that is finished; recorded with the step from which they hold, the run's own stay as they were."""
    run_dir = tmp_path / "run"
    assert start(train_iters=2)[0] == 0
    before = (run_dir / "run.json").read_bytes()
    for steps in (2, 4):
        status, output = start(load=run_dir, train_iters=steps, **{name: value})
        assert status == 2 and "was trained with other settings" in output and shown in output
        assert "--change-settings" in output and (run_dir / "run.json").read_bytes() == before
    status, output = start(load=run_dir, train_iters=4, change_settings=True, **{name: value})
    assert status == 0, output
    now, then = record(run_dir), json.loads(before)
    (changed,) = [key for key in now.attempts[-1].changed if key.endswith(f".{name}")]
    assert now.config == then["config"] and now.run_id == then["run_id"]
    assert now.attempts[-1].from_step == 2 and now.attempts[-1].changed[changed][1] == value


def test_tokens_and_epochs_count_what_was_trained(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start(train_iters=2)[0] == 0
    assert start(load=run_dir, train_iters=4, seq_length=16, change_settings=True)[0] == 0
    rows = jobs.records(run_dir)
    assert [rows[step]["tokens"] for step in (1, 2, 3, 4)] == [256, 512, 640, 768]
    unique = record(run_dir).unique_tokens
    assert rows[4]["epoch"] == pytest.approx(768 / unique)
    assert rows[4]["flops"] == 6 * record(run_dir).parameters["for_compute"] * 768


@pytest.mark.parametrize(("batch", "steps"), [(16, 5), (4, 20)])
def test_another_batch_trains_exactly_the_remaining_samples(
    start: Start, tmp_path: Path, batch: int, steps: int
) -> None:
    run_dir = tmp_path / "run"
    options = {"train_iters": None, "train_samples": 160, "log_interval": 1, "save_interval": 10}
    assert start(**options)[0] == 0
    shutil.rmtree(run_dir / "global_step20")
    (run_dir / "latest").write_text("global_step10")
    status, output = start(load=run_dir, **{**options, "global_batch_size": batch})
    assert status == 0 and "run.global_batch_size was 8" in output
    rows = jobs.records(run_dir)
    assert [rows[step]["samples"] for step in (10, 11, 10 + steps)] == [80, 80 + batch, 160]
    assert max(rows) == 10 + steps


def test_other_data_are_refused_by_content(start: Start, token_files: Path, tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    assert start(train_iters=2)[0] == 0
    shutil.copytree(token_files, moved, ignore=shutil.ignore_patterns("index-cache"))
    assert start(load=run_dir, train_iters=3, train_data_path=moved / "train")[0] == 0  # the same, elsewhere
    with IndexedDatasetWriter(tmp_path / "other", np.dtype(np.uint16)) as writer:
        for size in (400, 300):
            writer.add_document(np.arange(size) % 500)
    train = IndexedDataset(token_files / "train")
    with IndexedDatasetWriter(tmp_path / "twin", train.dtype) as writer:  # documents of the same lengths, other tokens
        for index in range(len(train)):
            writer.add_document(train[index][::-1])
    for name in ("other", "twin"):
        status, output = start(load=run_dir, train_iters=4, train_data_path=tmp_path / name)
        assert status == 2 and "data.train" in output


def test_a_missing_folder_to_load_is_refused_and_a_fresh_start_is_said(start: Start, tmp_path: Path) -> None:
    status, output = start(load=tmp_path / "TYPO")
    assert status == 2 and f"--load {tmp_path}/TYPO does not exist" in output
    status, output = start(load=tmp_path / "run", train_iters=1)
    assert status == 0 and f"starting fresh: no checkpoint in {tmp_path}/run yet" in output


def test_a_checkpoint_is_judged_as_what_it_was_trained_for(start: Start, tmp_path: Path, token_files: Path) -> None:
    assert start(train_iters=1)[0] == 0
    options = {"skip_train": True, "train_iters": None, "train_data_path": None, "save": None}
    options |= {"load": tmp_path / "run", "valid_data_path": token_files / "valid"}
    for changes in ({}, {"finetune": True}):
        status, output = start(objective="ar", **options, **changes)
        assert status == 2 and "is a checkpoint of objective mdm, this run evaluates ar" in output
    assert not (tmp_path / "run/evaluations").exists()


def test_a_run_that_is_to_end_before_where_it_stands_is_refused(start: Start, tmp_path: Path) -> None:
    assert start(train_iters=3)[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    for changes in ({"train_iters": 2}, {"train_iters": 5, "global_batch_size": 4}):
        status, output = start(load=tmp_path / "run", **changes)
        assert status == 2 and "has trained on 24 samples, this run is to end at" in output
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_new_run_from_its_own_weights_needs_another_folder(start: Start, tmp_path: Path) -> None:
    assert start(train_iters=2)[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    status, output = start(load=tmp_path / "run", finetune=True, train_iters=1)
    assert status == 2 and "--finetune with one folder" in output
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_record_that_cannot_be_read_is_kept_and_said(start: Start, tmp_path: Path) -> None:
    assert start(train_iters=1)[0] == 0
    (tmp_path / "run/run.json").write_text("{")
    status, output = start(load=tmp_path / "run", train_iters=2)
    assert status == 0 and "run.json cannot be read; it is kept as run.json.damaged" in output
    assert (tmp_path / "run/run.json.damaged").read_text() == "{" and record(tmp_path / "run").run_id


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_without_alarm(
    start: Start, tmp_path: Path
) -> None:
    assert start(train_iters=1)[0] == 0
    for path in (tmp_path / "run").glob("global_step*"):
        shutil.rmtree(path)
    (tmp_path / "run/latest").unlink()
    before = record(tmp_path / "run").run_id
    status, output = start(load=tmp_path / "run", train_iters=1)
    assert status == 0 and "starting fresh" in output and "cannot be read" not in output
    assert record(tmp_path / "run").run_id != before and not (tmp_path / "run/run.json.damaged").exists()


def test_an_evaluation_lies_beside_the_run_that_it_judges(start: Start, tmp_path: Path, token_files: Path) -> None:
    run_dir = tmp_path / "run"
    assert start(train_iters=2, valid_data_path=token_files / "valid", eval_iters=2)[0] == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    options = {"skip_train": True, "train_iters": None, "train_data_path": None, "save": None, "load": run_dir}
    status, output = start(valid_data_path=token_files / "valid", eval_iters="full", num_mc=2, **options)
    assert status == 0 and f"recorded in {run_dir}/evaluations/" in output
    assert {path: path.read_bytes() for path in before} == before
    (path,) = (run_dir / "evaluations").glob("*.json")
    found = json.loads(path.read_text())
    assert (found["checkpoint"], found["run_id"], found["objective"]) == ("global_step2", record(run_dir).run_id, "mdm")
    assert found["protocol"]["num_mc"] == 2 and found["protocol"]["valid"][0]["idx_sha256"]
    row = ValidRow(**found["result"])
    estimate = mean_loss(load_sums(path.with_suffix(".npz")))
    assert (row.nll, row.nll_se) == (estimate.value, estimate.error) and row.se_kind == "documents"
    assert jobs.records(run_dir)[2]["epoch"] == row.epoch


def test_more_validation_than_there_is_takes_each_sample_once(start: Start, tmp_path: Path, token_files: Path) -> None:
    options = {"train_iters": 1, "valid_data_path": token_files / "valid"}
    assert start(save=tmp_path / "all", eval_iters="full", **options)[0] == 0
    status, output = start(save=tmp_path / "more", eval_iters=1000, **options)
    assert status == 0 and "samples, each once (--eval-iters asks for 8000)" in output
    whole, more = (jobs.records(tmp_path / name, "valid")[1] for name in ("all", "more"))
    assert (more["num_samples"], more["nll"], more["nll_se"]) == (whole["num_samples"], whole["nll"], whole["nll_se"])


def test_order_and_decay_are_planned_with_the_given_samples(token_files: Path, tmp_path: Path) -> None:
    """As megatron-core does; training ends with the last whole batch."""
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=None, train_samples=190, lr_warmup_fraction=0.0125)
    plan = resolve(parse(argv, objective="ar"), Launch(), run_name="x")
    rate = plan.settings.optimizer
    assert (plan.schedule.train_samples, rate.lr_decay_samples, rate.lr_warmup_samples) == (190, 190, 2.375)


def test_a_run_of_679_samples_trains_the_first_672_of_an_order_of_679(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """An epoch has 675: an order of 672 needs one and is another one."""
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=None, train_samples=679, num_layers=1)
    (trace,) = pools(1).run(jobs.train, "ar", argv, ("tensors",))
    assert trace.status == 0 and jobs.records(tmp_path / "run")[84]["samples"] == 672
    read = torch.cat([batch.inputs.input_ids for batch in trace.batches]).numpy()
    planned, rounded = (GPTDataset(token_files / "train", count, 32, 1234) for count in (679, 672))
    assert [(read[index] == planned[index][:-1]).all() for index in range(672)].count(False) == 0
    assert sum((rounded[index] == planned[index]).all() for index in range(672)) < 10


def test_a_mask_that_is_a_token_of_another_vocabulary_is_refused(start: Start, tmp_path: Path) -> None:
    assert start(train_iters=1)[0] == 0
    options = {
        "load": tmp_path / "run",
        "save": tmp_path / "other",
        "finetune": True,
        "train_iters": 1,
        "vocab_size": 505,
    }
    status, output = start(**options)
    assert status == 2 and "the mask id 500 of the checkpoint is a token of this vocabulary of 505" in output
    assert start(**options, mask_token_id=505)[0] == 0


def test_a_second_run_in_one_folder_is_refused_at_once(token_files: Path, tmp_path: Path) -> None:
    argv = jobs.flags(token_files, tmp_path, load=tmp_path, train_iters=100_000, log_interval=1)
    first = Process(jobs.run_main, "mdm", argv)
    first.wait_until(lambda: (tmp_path / "metrics.jsonl").exists())
    command = [sys.executable, "-X", "importtime", str(REPO / "pretrain_mdm.py"), *argv]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "is being trained into by process" in second.stderr and " since " in second.stderr
    imported = re.findall(r"^import time:.*\| +(\S+)$", second.stderr, re.MULTILINE)
    assert "megatron.runs.record" in imported and "torch" not in imported  # heard before the seconds of imports
    assert first.is_running
    first.stop()  # killed: its lock is stale
    argv = jobs.flags(token_files, tmp_path, load=tmp_path, train_iters=100_000, exit_duration_in_mins=1e-6)
    assert Process(jobs.run_main, "mdm", argv).wait() == 75


def test_the_first_loss_does_not_depend_on_tensor_parallelism_where_the_vocabulary_is_padded(
    start: Start, tmp_path: Path, token_files: Path
) -> None:
    options = {"train_iters": 1, "vocab_size": 501, "make_vocab_size_divisible_by": 128}
    for size, name in ((1, "one"), (2, "two")):
        assert start(size, save=tmp_path / name, tp_size=size, **options)[0] == 0
    losses = [jobs.records(tmp_path / name)[1]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_run_json_says_where_it_happened_and_what_it_had(start: Start, tmp_path: Path) -> None:
    assert start(train_iters=1)[0] == 0
    found = record(tmp_path / "run")
    attempt = found.attempts[0]
    assert attempt.command and attempt.host and attempt.version and attempt.versions["torch"] and attempt.device
    assert attempt.ended is not None and attempt.ended["reason"] == "end"
    (part,) = found.data["train"]
    assert attempt.commit and attempt.command[0] and attempt.layout["world"] == 1
    assert Path(part["prefix"]).is_absolute() and part["documents"] == 300 and len(part["idx_sha256"]) == 64
    assert found.tokenizer["vocab_size"] == jobs.VOCAB and found.noise_scheme == 2 and found.run_id
    manifest = json.loads((tmp_path / "run/global_step1/manifest.json").read_text())
    assert manifest["run_id"] == found.run_id and manifest["data"] == found.data


def test_tensorboard_shows_a_step_once_after_going_back(start: Start, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard_dir": tmp_path / "events", "train_iters": 6, "save_interval": 2}
    assert start(**options)[0] == 0
    assert start(load=tmp_path / "run", load_tag="global_step2", **options)[0] == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_validation_that_was_owed_is_made_up(start: Start, tmp_path: Path, token_files: Path) -> None:
    """The save comes first; a kill between the two must not leave a hole in the curve."""
    options = {"valid_data_path": token_files / "valid", "eval_iters": 1, "eval_interval": 2, "save_interval": 2}
    assert start(train_iters=4, **options)[0] == 0
    whole = jobs.records(tmp_path / "run", "valid")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(
        "".join(line for line in metrics.read_text().splitlines(True) if '"valid", "step": 4' not in line)
    )
    assert list(jobs.records(tmp_path / "run", "valid")) == [2]
    assert start(load=tmp_path / "run", train_iters=4, **options)[0] == 0
    assert jobs.records(tmp_path / "run", "valid") == whole
