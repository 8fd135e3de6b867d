"""A run's configuration goes out and comes back: ``--dump-config``, ``--config RUN/run.json``, ``--use-checkpoint-args``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.config import Config, values_of
from megatron.config.recorded import repeated
from megatron.data.blend import data_paths
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse
from megatron.parallel.launch import Launch
from megatron.training.configuration import check_contents, recorded
from megatron.training.main import main
from megatron.training.plan import Plan
from megatron.training.resolve import resolve

OLD = Path(__file__).parents[2] / "tests/golden/run_v1"
MEASURED = ("loss", "grad_norm", "lr", "nll", "nll_se", "step", "samples")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """What must be equal bit for bit when a run is repeated."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in MEASURED if name in row} for row in rows]


def test_a_dump_is_every_setting_with_its_origin_and_starts_nothing(
    token_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = jobs.flags(
        token_files, tmp_path / "run", model="7M", num_layers=None, hidden_size=None, num_attention_heads=None
    )
    (tmp_path / "a.yaml").write_text("lr: 5e-4\nwandb_project: no\n")
    words = [word for word in words if word not in ("--lr", "0.001")]
    words += ["--config", str(tmp_path / "a.yaml"), "--deepspeed_config", str(tmp_path / "ds.json"), "--dump-config"]
    (tmp_path / "ds.json").write_text('{"wall_clock_breakdown": false}')
    assert main("mdm", words) == 0 and not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    lines = dict(line.strip().split(":", 1) for line in text.splitlines() if line.startswith("  "))
    assert lines["lr"].split() == ["0.0005", "#", str(tmp_path / "a.yaml")]
    assert lines["# num_layers"].split() == ["3", "#", "preset", "7M"] and lines["seq_length"].endswith("# flag")
    assert lines["# lr_decay_samples"].split() == ["80", "#", "worked", "out"] and lines["clip_grad"].endswith(
        "# default"
    )
    assert f"# {tmp_path}/ds.json: wall_clock_breakdown False" in text and "# Processes (environment): 1 = tp 1" in text
    shown = {name: value for section in yaml.safe_load(text).values() for name, value in section.items()}
    assert shown["wandb_project"] == "no" and shown["objective"] == "mdm"
    assert {name.removeprefix("# ") for name in lines} >= values_of(Config()).keys() | {"ar_ratio"}
    # To a file; it is the same, and gives the same again.
    assert main("mdm", [*words, str(tmp_path / "b.yaml")]) == 0 and (tmp_path / "b.yaml").read_text() == text
    assert main("mdm", [*words[:-1], "--dump_config"]) == 0 and capsys.readouterr().out.startswith(text)
    with pytest.raises(UserError, match="--dump-config; this program prints no settings"):
        parse(words, objective="mdm")
    assert main("ar", ["--config", str(tmp_path / "b.yaml"), "--dump-config"]) == 0
    again = capsys.readouterr().out
    assert yaml.safe_load(again) == yaml.safe_load(text)
    assert main("mdm", [*words[:-1], "--lr", "nan", "--dump-config"]) == 2
    for place, message in (
        ("", "no name of a file"),
        (str(tmp_path), "no name of a file"),
        (str(tmp_path / "a.yaml"), "there is such"),
    ):
        assert main("mdm", [*words, place]) == 2
        assert message in capsys.readouterr().err


def test_a_run_is_repeated_from_its_record_bit_for_bit(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(token_files, data)
    run, again = tmp_path / "run", tmp_path / "again"
    changes = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "train_iters": 4,
        "eval_interval": 2,
        "num_mc": 2,
        "ar_ratio": 0.5,
        "lr_warmup_samples": None,
        "lr_warmup_fraction": 0.1,
    }
    words = jobs.flags(data, run, load=run, valid_data_path=data / "valid", save_best=True, **changes)
    assert pools(1).run(jobs.train, "mdm", words)[0].status == 0
    shown = pools(1).output(0).splitlines()
    at = next(place for place, line in enumerate(shown) if line.startswith("flag: "))
    block = shown[at : next(place for place, line in enumerate(shown) if line.startswith("starting fresh"))]
    assert "lr 0.001" in " ".join(block) and "ar_ratio 0.5" in " ".join(block) and max(map(len, block)) <= 80
    record = json.loads((run / "run.json").read_text())
    assert record["origins"]["lr"] == "flag" and record["origins"]["lr_decay_samples"] == "worked out"
    config = ["--config", str(run / "run.json")]
    # Another default objective; what is asked for beside it wins.
    assert pools(1).run(jobs.train, "ar", [*config, "--save", str(again), "--wandb-group", "x"])[0].status == 0
    assert curve(again) == curve(run) and len(curve(run)) == 6
    assert not any("worked out" in line for line in pools(1).output(0).splitlines())
    assert json.loads((again / "run.json").read_text())["origins"]["lr_warmup_samples"] == "worked out"
    # A repetition in the folder of the run is refused by the rule that stands there already; so are other data.
    assert pools(1).run(jobs.train, "mdm", config)[0].status == 2
    assert f"--save {run} holds a run already; a run directory belongs to one run; pass --load" in pools(1).output(0)
    shutil.copy(token_files / "valid.bin", data / "train.bin")
    shutil.copy(token_files / "valid.idx", data / "train.idx")
    third = [*config, "--save", str(tmp_path / "third"), "--allow-training-data-in-validation"]
    assert pools(1).run(jobs.train, "mdm", third)[0].status == 2
    assert "a repetition reads the same data; pass --train-data-path" in pools(1).output(0)


def test_a_run_of_the_first_version_is_repeated_bit_for_bit(pools: Callable[[int], WorkerPool], tmp_path: Path) -> None:
    """Under the noise scheme of its time, which no flag of it named; its relative paths are given anew."""
    words = ["--config", str(OLD / "mdm/run.json"), "--save", str(tmp_path / "run"), "--num-workers", "0"]
    words += ["--train-data-path", str(OLD / "train"), "--valid-data-path", str(OLD / "valid")]
    assert pools(1).run(jobs.train, "mdm", words)[0].status == 0
    found, expected = curve(tmp_path / "run"), curve(OLD / "mdm")
    assert [row.get("loss") for row in found] == [row.get("loss") for row in expected]
    assert json.loads((tmp_path / "run/run.json").read_text())["noise_scheme"] == 1


def test_what_a_repetition_takes_over_and_what_not() -> None:
    record = json.loads((OLD / "mdm/run.json").read_text())
    changes = {
        "overwrite": True,
        "tensorboard_dir": "tb",
        "log_validation_ppl_to_tensorboard": True,
        "kill_switch_file": "stop",
        "load": "other",
        "save_interval": 7,
    }
    record["config"]["run"] |= changes
    record["attempts"] = [
        {"from_tag": "other/global_step5", "changed": {}},
        {"from_step": 20, "changed": {"optimizer.lr": [1e-3, 2e-4, "results"]}},
    ]
    values, lines = repeated(record, Path("there/run.json"), OBJECTIVES)
    assert (values["save"], values["load"], values["load_tag"]) == ("there", "other", "global_step5")
    assert values["noise_scheme"] == 1  # a record of the first version has none
    record["config"]["run"]["noise_scheme"] = record["noise_scheme"] = 2
    assert repeated(record, Path("there/run.json"), OBJECTIVES)[0]["noise_scheme"] == 2
    assert not values["overwrite"] and values["tensorboard_dir"] is None and values["save_interval"] == 7
    assert values["log_validation_ppl_to_tensorboard"]  # for another --tensorboard-dir
    assert lines == [
        "there/run.json: not taken over: --overwrite True, --kill-switch-file stop, --tensorboard-dir tb",
        "there/run.json: optimizer.lr is 0.001, with which the run began; from step 20 on the run had 0.0002",
    ]
    record["config"]["run"]["load"] = record["config"]["run"]["save"]  # it was told to continue itself
    assert repeated(record, Path("there/run.json"), OBJECTIVES)[0]["load"] is None
    manifest = OLD / "mdm/global_step5/manifest.json"
    with pytest.raises(UserError, match=r"manifest.json is no record of a run; .*; pass its run\.json"):
        parse(["--config", str(manifest)])
    for damage in ({"model": {"num_layers": "x"}}, {"model": None}, {"frob": {}}, {"run": {"hiden": 1}}, 5):
        with pytest.raises(UserError) as stop:
            repeated({**record, "config": damage}, Path("there/run.json"), OBJECTIVES)
        assert stop.value.fix


def test_a_change_moves_what_follows_from_it(tmp_path: Path) -> None:
    """Recorded numbers that follow from others do not stay behind."""
    words = ["--config", str(OLD / "gpt/run.json"), "--save", str(tmp_path)]
    longer = values_of(parse([*words, "--train-epochs", "3"]))
    assert (longer["train_iters"], longer["train_samples"], longer["lr_decay_samples"]) == (None, None, None)
    wider = values_of(parse([*words, "--model", "7M"]))
    assert (wider["num_layers"], wider["hidden_size"], wider["ffn_hidden_size"], wider["lr"]) == (
        None,
        None,
        None,
        1e-3,
    )
    assert values_of(parse([*words, "--objective", "mdm"]))["objective"] == "mdm"


DATA = ["--train-data-path", str(OLD / "train"), "--valid-data-path", str(OLD / "valid"), "--train-iters", "3"]


def plan_of(*words: str, objective: str = "mdm") -> Plan:
    flags = parse([*DATA, *words], objective=objective, recorded=recorded)
    return resolve(flags, Launch(), run_name="new")


def test_a_model_is_what_its_checkpoint_says(tmp_path: Path) -> None:
    load = ["--load", str(OLD / "gpt"), "--save", str(tmp_path / "run"), "--use-checkpoint-args"]
    plan = plan_of(*load, "--finetune")
    shape = plan.shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.seq_length) == (2, 16, 32, 16)
    assert (
        plan.settings.objective.objective == "mdm" and plan.settings.optimizer.lr == 2e-4
    )  # training is not the model
    assert plan.vocabulary.size == 99 and plan.start.tag == OLD / "gpt/global_step5"
    judged = plan_of("--load", str(OLD / "gpt"), "--skip-train", "--use_checkpoint_args")
    assert judged.settings.objective.objective == "ar"
    (tmp_path / "a.yaml").write_text("use-checkpoint-args: true\nhidden_size: 16")
    assert plan_of("--config", str(tmp_path / "a.yaml"), *load[:4], "--finetune").shape == shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--finetune", "--num-layers", "3", "--seq-length=8"], r"num_layers is 3 \(flag\) and 2 in the checkpoint; "
         r"seq_length is 8 \(flag\) and 16 in the checkpoint; the checkpoint says.*; drop them, or drop --use-checkpoint-args"),
        (["--finetune", "--model", "7M"], r"model is 7M \(flag\) and None in the checkpoint"),
        (["--finetune", "--no-swiglu"], r"swiglu is False \(flag\) and True"),
        (["--skip-train", "--objective", "mdm"], r"objective is mdm \(flag\) and ar in the checkpoint"),
        (["--finetune", "--load-tag", "global_step9"], "global_step9"),
    ],
)  # fmt: skip
def test_what_contradicts_the_checkpoint_is_refused_with_both_values(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of("--load", str(OLD / "gpt"), "--use-checkpoint-args", *words)


def test_another_tokenizer_at_the_same_place_is_refused() -> None:
    plan = plan_of("--load", str(OLD / "gpt"), "--use-checkpoint-args", "--finetune")
    check_contents(plan)
    start = replace(plan.start, manifest={**plan.start.manifest, "tokenizer": {"fingerprint": "a"}})
    plan = replace(plan, start=start, origins={"vocab_size": "checkpoint global_step5"})
    check_contents(plan)
    with pytest.raises(UserError, match=r"the tokenizer of this run \(b\) is not that of --load .* \(a\)"):
        check_contents(replace(plan, vocabulary=replace(plan.vocabulary, tokenizer={"fingerprint": "b"})))


def test_without_a_checkpoint_there_are_no_settings_of_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--use-checkpoint-args without --load"):
        plan_of("--use-checkpoint-args")
    with pytest.raises(UserError, match="holds no checkpoint; shape and tokenizer are those of a checkpoint"):
        plan_of("--use-checkpoint-args", "--load", str(tmp_path), "--save", str(tmp_path))
    with pytest.raises(UserError, match=r"another architecture.*; pass --use-checkpoint-args or"):
        plan_of("--model", "7M", "--load", str(OLD / "gpt"), "--finetune", "--vocab-size", "99", "--tokenizer-type",
                "NullTokenizer")  # fmt: skip


def test_a_run_knows_the_tokenizer_that_its_data_name(token_files: Path, tmp_path: Path) -> None:
    """By its content, so that what is made in the place of the data later is not taken for it."""
    shutil.copytree(token_files, tmp_path / "data")
    own = {"vocab_size": jobs.VOCAB, "tokenizer_fingerprint": "0123"}
    for name, meta in (("train", own), ("valid", own | {"tokenizer_fingerprint": "4567"})):
        (tmp_path / f"data/{name}.meta.json").write_text(json.dumps(meta))
    argv = jobs.flags(tmp_path / "data", None, tokenizer_type=None, vocab_size=None)
    plan = resolve(parse(argv, objective="ar"), Launch(), run_name="x", is_rehearsal=True)
    assert plan.vocabulary.tokenizer == {"vocab_size": jobs.VOCAB, "fingerprint": "0123"}
    with pytest.raises(UserError, match=r"data/valid was made with .* 4567; .*data/train has .* 0123"):
        resolve(parse([*argv, "--valid-data-path", f"{tmp_path}/data/valid"], objective="ar"), Launch(), run_name="x")


def test_a_record_names_data_and_tokenizer_from_whatever_folder_it_is_read(
    token_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export from another folder found no tokenizer: it looked beside a relative path of data."""
    shutil.copytree(token_files, tmp_path / "data")
    for suffix in (".bin", ".idx"):
        shutil.copy(token_files / f"train{suffix}", tmp_path / f"data/more{suffix}")
    (tmp_path / "list.txt").write_text("0.5 data/train 0.5 data/more\n")
    monkeypatch.chdir(tmp_path)
    for changes, expected in (
        ({"train_data_path": "data/train"}, [f"{tmp_path}/data/train"]),
        ({"train_data_path": None, "train_data_path_file": "list.txt"},
         ["0.5", f"{tmp_path}/data/train", "0.5", f"{tmp_path}/data/more"]),
    ):  # fmt: skip
        argv = jobs.flags(token_files, tmp_path / "run", valid_data_path="data/valid", **changes)
        data = resolve(parse(argv, objective="ar"), Launch(), run_name="x").settings.data
        assert (data.train_data_path, data.valid_data_path) == (expected, [f"{tmp_path}/data/valid"])
        assert (data_paths(data, "train"), data_paths(data, "valid")) == (expected, [f"{tmp_path}/data/valid"])
