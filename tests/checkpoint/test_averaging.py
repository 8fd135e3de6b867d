"""Means of checkpoints: the numbers, where they come from, what takes them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.averaging import mean_of
from megatron.checkpoint.files import read_manifest
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.tensors import save_full_checkpoint
from megatron.checkpoint.warm_start import open_checkpoint
from megatron.commands.average import main
from megatron.commands.convert import main as convert
from megatron.commands.running import status_of
from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.inference.model import load_model
from megatron.parallel.context import ParallelContext
from tests.evaluation import tiny

STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    tokenizer = tiny.build_tokenizer_file(tmp_path_factory.mktemp("tokenizer"))
    return tiny.config_for("ar", tokenizer, vocab_size=600)


def tensors_of(config: Config, step: int) -> dict[str, torch.Tensor]:
    return tiny.random_tensors(config, seed=step)


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Path:
    """Three checkpoints of one run."""
    folder = tmp_path / "run"
    for step in STEPS:
        more = {"run_id": "one", "consumed_samples": 8 * step}
        save_full_checkpoint(folder, config, tensors_of(config, step), step=step, more=more)
    return folder


def average(*words: object) -> int:
    return status_of(lambda: main([str(word) for word in words]))


def test_the_last_two_are_averaged_in_fp32(run: Path, config: Config, tmp_path: Path) -> None:
    assert average(run, "--last", 2, "--output", tmp_path / "mean") == 0
    reader = CheckpointReader(tmp_path / "mean" / "global_step30")
    second, third = (tensors_of(config, step) for step in STEPS[1:])
    assert set(reader.specs) == set(third)
    for name in reader.specs:
        assert reader.tensor(name).dtype == torch.float32
        torch.testing.assert_close(reader.tensor(name), (second[name] + third[name]) / 2, atol=1e-7, rtol=1e-7)
    found = reader.manifest["averaged_from"]
    assert [(part["step"], part["run_id"], part["weights"]) for part in found] == [
        (20, "one", "weight"),
        (30, "one", "weight"),
    ]
    assert found[1]["sha256"] == read_manifest(run / "global_step30")["sha256"]
    assert reader.manifest["consumed_samples"] == 240
    assert "global_step20" in json.loads((tmp_path / "mean" / "run.json").read_text())["converted_from"]


def test_any_set_may_be_named_and_everything_takes_the_mean(run: Path, config: Config, tmp_path: Path) -> None:
    other = tiny.make_run(tmp_path / "other", config, seed=7, step=5)
    mean = tmp_path / "mean"
    assert average(run / "global_step10", other, run, "--output", mean) == 0
    parts = [tensors_of(config, 10), tensors_of(config, 7), tensors_of(config, 30)]
    loaded = load_model(mean)
    for name, tensor in loaded.model.tensors().items():
        torch.testing.assert_close(tensor.detach(), sum(part[name] for part in parts) / 3, atol=1e-6, rtol=1e-6)
    assert status_of(lambda: convert(["to-hf", str(mean), str(tmp_path / "hf"), "--no-tokenizer"])) == 0
    start = select(mean).tag
    assert start is not None
    finetune = replace(config, run=replace(config.run, finetune=True))
    assert open_checkpoint(start, finetune, ParallelContext(), vocab_size=600).manifest["optimizer_steps"] == 0


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(
    run: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Path(str(config.data.tokenizer_model))
    others = {
        "num_layers": tiny.config_for("ar", tokenizer, vocab_size=600, num_layers=3),
        "objective": tiny.config_for("mdm", tokenizer, vocab_size=600),
        "padded_vocab_size": tiny.config_for("ar", tokenizer, vocab_size=700),
        "layernorm_epsilon": tiny.config_for("ar", tokenizer, vocab_size=600, layernorm_epsilon=1e-6),
    }
    for name, changed in others.items():
        other = tiny.make_run(tmp_path / name, changed)
        assert average(run, other, "--output", tmp_path / "mean") == 2
        error = capsys.readouterr().err
        assert f"has {name} " in error and "models of one kind" in error, error
    for words, complaint in (
        ((run, "--last", 4), "holds 3 checkpoints and --last asks for 4"),
        ((run,), "global_step30 alone"),
        ((run, run / "global_step30"), "given twice"),
        ((run, "--last", 2, "--load-kind", "ema"), "has no averaged weights"),
        ((tmp_path / "absent", run), "holds no checkpoint"),
    ):
        assert average(*words, "--output", tmp_path / "mean") == 2
        assert complaint in capsys.readouterr().err
    shard = next((run / "global_step20").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert average(run, "--last", 3, "--output", tmp_path / "mean") == 2
    assert "global_step20 (shard-00000.safetensors has" in capsys.readouterr().err
    assert not list(tmp_path.glob("*mean*"))


def test_a_tokenizer_that_is_not_recorded_is_no_other_one(config: Config, tmp_path: Path) -> None:
    """As in the first checkpoints of a run that went on under a version which records it."""
    tensors = tiny.random_tensors(config)
    tags = [
        save_full_checkpoint(tmp_path, config, tensors, step=step, more={"tokenizer": {"fingerprint": fingerprint}})
        for step, fingerprint in ((10, None), (20, "a"), (30, "b"))
    ]
    assert set(mean_of(tags[:2], "weight")[1]) == set(tensors)
    with pytest.raises(UserError, match=r"has tokenizer a, .*global_step30 b"):
        mean_of(tags, "weight")


def test_a_mean_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.checkpoint import writer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    assert average(run, "--last", 2, "--output", tmp_path / "mean") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    assert average(run, "--last", 2, "--output", run) == 2  # never over something that is there
    assert "exists and is not empty" in capsys.readouterr().err
