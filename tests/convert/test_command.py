"""tools/convert_checkpoint.py from end to end, with the golden checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron.commands.convert import main
from megatron.commands.running import status_of
from megatron.convert.published import find_published
from megatron.convert.run_folder import read_run
from megatron.convert.unpickle import load_pickled
from tests.convert.reference import layer_files, make_config, plain_logits, random_tensors, write_published
from tests.convert.test_unpickle import Bomb

GOLDEN = str(Path(__file__).resolve().parents[1] / "golden" / "ar_ckpt")


def run(*arguments: object) -> int:
    return status_of(lambda: main([str(argument) for argument in arguments]))


def test_golden_to_run_to_hugging_face_agrees_with_plain_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("from-published", GOLDEN, tmp_path / "run", "--objective", "ar", "--verify") == 0
    assert json.loads(capsys.readouterr().out)["verified"] <= 1e-5
    assert run("to-hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer", "--verify") == 0
    tag = find_published(GOLDEN)
    layers = {layer: load_pickled(tag / f"layer_{layer:02d}-model_00-model_states.pt") for layer in range(1, 6)}
    ids = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(5))
    expected = plain_logits(layers, ids, heads=4, kv=16, causal=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["objective"], info["label"], info["converted_from"]) == ("ar", "NLL (exact)", GOLDEN)
    assert info["parameters"]["total"] == sum(tensor.numel() for layer in layers.values() for tensor in layer.values())
    config, _, folder = read_run(tmp_path / "run")
    assert folder.name == "global_step20"
    assert config.model.num_layers == 3


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mdm_round_trip(tmp_path: Path, tp: int, dtype: torch.dtype) -> None:
    """Published layout -> run -> Hugging Face -> run -> Hugging Face; logits against plain torch, then bit for bit."""
    config = make_config("mdm")
    tensors = {name: tensor.to(dtype).float() for name, tensor in random_tensors(config.model).items()}
    write_published(tmp_path / "published", config, tensors, tp=tp, dtype=dtype)
    assert run("from-published", tmp_path / "published", tmp_path / "run", "--objective", "mdm") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer", "--verify") == 0
    ids = torch.randint(0, 384, (2, 32), generator=torch.Generator().manual_seed(5))
    expected = plain_logits(layer_files(config, tensors), ids, heads=4, kv=12, causal=False)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert run("from-hf", tmp_path / "hf", tmp_path / "again", "--verify") == 0
    assert run("to-hf", tmp_path / "again", tmp_path / "hf2") == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf2" / name).read_bytes()
    assert run("published-to-hf", tmp_path / "published", tmp_path / "hf3", "--objective", "mdm", "--no-tokenizer") == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "hf3" / "model.safetensors").read_bytes()


def test_trimmed_export(tmp_path: Path) -> None:
    config = make_config("mdm")
    write_published(tmp_path / "published", config, random_tensors(config.model))
    arguments = ("published-to-hf", tmp_path / "published", tmp_path / "hf", "--objective", "mdm", "--no-tokenizer")
    assert run(*arguments, "--trim-vocab", "--verify", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 301


def hostile(folder: Path) -> None:
    torch.save({"x": Bomb(os.system, f"touch {folder.parent}/ran")}, folder / "layer_02-model_00-model_states.pt")


def truncated(folder: Path) -> None:
    path = folder / "layer_02-model_00-model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])


def missing(folder: Path) -> None:
    path = folder / "layer_02-model_00-model_states.pt"
    state = torch.load(path, weights_only=False)
    del state["self_attention.dense.weight"]
    torch.save(state, path)


def extra(folder: Path) -> None:
    path = folder / "layer_02-model_00-model_states.pt"
    torch.save({**torch.load(path, weights_only=False), "bias": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (hostile, "posix.system"),
        (truncated, "truncated or damaged"),
        (missing, "missing layers.0"),
        (extra, "unknown layers.0.bias"),
    ],
)
@pytest.mark.parametrize("command", ["from-published", "published-to-hf"])
def test_bad_checkpoints_end_in_one_message_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, damage, message: str
) -> None:
    config = make_config()
    folder = write_published(tmp_path / "published", config, random_tensors(config.model)) / "global_step7"
    damage(folder)
    assert run(command, tmp_path / "published", tmp_path / "out", "--objective", "ar") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    assert not (tmp_path / "published" / "ran").exists()


def test_damaged_runs_and_truncated_safetensors_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    write_published(tmp_path / "published", config, random_tensors(config.model))
    run("from-published", tmp_path / "published", tmp_path / "run", "--objective", "ar")
    run("to-hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer")
    for path in (tmp_path / "run" / "global_step7" / "shard-00000.safetensors", tmp_path / "hf" / "model.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 2
    assert run("from-hf", tmp_path / "hf", tmp_path / "out") == 2
    assert "truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_existing_outputs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    assert run("from-published", GOLDEN, tmp_path / "run", "--objective", "ar") == 2
    assert "is never overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
