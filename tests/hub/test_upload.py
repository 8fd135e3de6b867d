"""Upload of a run to a hub on localhost, its model card, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants

from megatron.commands.push import main
from megatron.commands.running import status_of
from megatron.config.schema import DataConfig
from megatron.convert.run_folder import read_run, write_run
from megatron.hub.model_card import model_card, without_local_paths
from tests.convert.reference import make_config, random_tensors
from tests.hub.fake_hub import Hub


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of a byte-level MDM with 30 validations, the best at step 200."""
    config = make_config("mdm", vocab_size=257)
    config = replace(
        config, data=DataConfig(tokenizer_type="ByteTokenizer", vocab_size=257, train_data_path=["/secret/home/data"])
    )
    path = tmp_path / "run"
    write_run(path, config, random_tensors(config.model), step=300, source="elsewhere")
    info = json.loads((path / "run.json").read_text())
    del info["converted_from"]
    info.update(unique_tokens=1_000_000, epochs=12.5, train_tokens=12_500_000, train_flops=1.5e15)
    info["config"]["run"]["global_batch_size"] = 8
    (path / "run.json").write_text(json.dumps(info))
    lines = [{"kind": "train", "step": 1, "loss": 9.0}]
    for step in range(10, 301, 10):
        nll = 3.0 + abs(step - 200) / 100
        lines.append({"kind": "valid", "step": step, "samples": step * 8, "tokens": step * 256, "epoch": step / 24,
        "flops": 1.0,
                      "nll": nll, "nll_se": 0.0123, "label": "NLL bound", "ppl": 2.7**nll, "bits_per_byte": None})  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "va'
    (path / "metrics.jsonl").write_text(text)
    return path


def test_card_says_what_the_run_says(run_dir: Path) -> None:
    card = model_card(run_dir, repo_id="me/model", step=300, family="mdm", license_name="apache-2.0")
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "fill-mask"
    assert header["license"] == "apache-2.0"
    assert "| unique tokens | 1,000,000 |" in card
    assert "| epochs | 12.5 |" in card
    assert "NLL bound" in card
    assert "A bound lies above the true likelihood" in card
    best, last = (next(line for line in card.splitlines() if line.startswith(f"| {step} |")) for step in (200, 300))
    assert "3.0000 | 0.0123" in best
    assert best.endswith("| best |")
    assert last.endswith("| these weights |")
    rows = [line for line in card.splitlines() if line.startswith("| ") and "0.0123" in line]
    assert len(rows) <= 14
    assert 'pipeline("fill-mask", model="me/model")' in card


def test_a_card_of_records_with_nulls_says_unknown(run_dir: Path) -> None:
    """FAULTS D9: TypeError; runs of conversions, of other versions and of failed validations have them."""
    info = json.loads((run_dir / "run.json").read_text())

    def emptied(value: object) -> object:
        return {key: emptied(entry) for key, entry in value.items()} if isinstance(value, dict) else None

    (run_dir / "run.json").write_text(json.dumps(emptied(info) | {"unique_tokens": 7, "train_tokens": 8}))
    line = {"kind": "valid", "step": 310, **dict.fromkeys(("epoch", "tokens", "nll", "nll_se", "ppl", "bits_per_byte"))}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(line) + '\n[]\n{"kind": "valid", "step": null}\n')
    card = model_card(run_dir, repo_id="me/model", step=310, family="mdm")
    assert "| learning rate | unknown to unknown, unknown |" in card
    assert "| layers, width, heads x channels | unknown, unknown, unknown x unknown |" in card
    assert "| epochs | unknown |" in card and "| compute (6ND) | unknown FLOPs |" in card
    assert next(line for line in card.splitlines() if line.startswith("| 310 |")).endswith("these weights |")
    assert next(line for line in card.splitlines() if line.startswith("| 200 |")).endswith("| best |")
    (run_dir / "run.json").write_text("{}")
    assert "| parameters | unknown |" in model_card(run_dir, repo_id="me/model", step=300, family=None)


def test_a_card_of_averaged_weights_shows_their_validations(run_dir: Path) -> None:
    """The validations of the trained weights stood there, as those of the uploaded ones."""
    row = {"kind": "valid_ema", "step": 300, "nll": 2.25, "nll_se": 0.5, "label": "NLL bound"}
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(row) + "\n")
    card = model_card(run_dir, repo_id="me/model", step=300, family="mdm", weights="ema")
    assert "Averaged weights (--ema-decay) of step 300" in card
    assert [line for line in card.splitlines() if line.startswith("| 300 |")] == [
        "| 300 |  |  | 2.2500 | 0.5000 |  |  | best, these weights |"
    ]
    assert "0.0123" not in card and "| 300 |  |  | 2.2500" not in model_card(
        run_dir, repo_id="me/m", step=300, family=None
    )


def test_local_paths_do_not_travel() -> None:
    value = {"a": ["/home/me/x.bin", "relative/y", "--save=/home/me/r"], "b": {"c": "/data/z"}, "d": 1, "e": "mdm"}
    short = {"a": ["x.bin", "relative/y", "--save=r"], "b": {"c": "z"}, "d": 1, "e": "mdm"}
    assert without_local_paths(value) == short


@pytest.fixture
def push(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command against the local hub, which speaks the LFS protocol (Xet needs a storage service of its own)."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return lambda *arguments: status_of(lambda: main([str(argument) for argument in arguments]))


def test_upload_arrives_and_loads(hub: Hub, push, run_dir: Path, tmp_path: Path) -> None:
    assert push(run_dir, "me/model", "--with-checkpoint") == 0
    files = hub.repos["model", "me/model"]
    expected = {
        "README.md",
        "config.json",
        "model.safetensors",
        "run.json",
        "metrics.jsonl",
        "latest",
        "tokenizer.json",
    }
    assert expected <= set(files)
    assert "global_step300/manifest.json" in files
    assert not any(b"/secret" in content for content in files.values())
    for name, content in files.items():
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back")
    config, tensors, _ = read_run(tmp_path / "back")
    assert torch.equal(model.get_input_embeddings().weight, tensors["word_embeddings.weight"])
    assert config.objective.mask_token_id == 257
    assert push(run_dir, "me/model", "--with-checkpoint") == 0
    puts = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(puts) == len(set(puts)), "what the hub has is not sent again"


def test_dry_run_uploads_nothing_and_keeps_the_folder(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run_dir), "me/model", "--dry-run", "--output", str(tmp_path / "staged")])
    assert "model.safetensors" in capsys.readouterr().out
    assert (tmp_path / "staged" / "README.md").is_file()


def test_only_what_was_staged_is_uploaded(
    hub: Hub, push, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an export, whatever lay in --output went up with the checkpoint."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "secret.txt").write_text("secret")
    arguments = (run_dir, "me/model", "--no-export", "--with-checkpoint", "--output", tmp_path / "mine")
    assert push(*arguments) == 2
    assert "a finished folder is never overwritten" in capsys.readouterr().err
    assert hub.repos == {} and [path.name for path in (tmp_path / "mine").iterdir()] == ["secret.txt"]
    assert push(*arguments[:-1], tmp_path / "new", "--load-kind", "ema") == 2
    assert "--load-kind would have no effect" in capsys.readouterr().err
    assert push(*arguments[:-1], tmp_path / "new") == 0
    assert "secret.txt" not in hub.repos["model", "me/model"]


def test_failures_are_one_message(
    hub: Hub, push, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(tmp_path / "nothing", "me/model") == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    assert push(run_dir, "me/model", "--no-export") == 2
    assert "--with-checkpoint" in capsys.readouterr().err
    hub.refuse_posts = True
    assert push(run_dir, "me/model") == 1
    assert "token with write access" in capsys.readouterr().err
    assert hub.repos == {}
