"""Hugging Face folders that are refused: other architectures, missing or extra tensors, damage, foreign code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.convert import hf_folder
from megatron.convert.hf_folder import export_folder, import_folder
from tests.convert.folders import NO_TOKENIZER
from tests.convert.reference import make_config, random_tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "layernorm"}, "--normalization layernorm"),
        ({"swiglu": False}, "--no-swiglu"),
        ({"disable_bias_linear": False}, "--no-disable-bias-linear"),
        ({"use_rotary_position_embeddings": False}, "learned positions"),
        ({"hidden_size": 50, "kv_channels": 12}, "--hidden-size 50 with 4 heads"),
    ],
)
def test_architectures_that_the_classes_lack_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    config = make_config(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        export_folder(config, random_tensors(config.model), tmp_path / "hf", options=NO_TOKENIZER)
    assert str(caught.value).count("; ") >= 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    config = make_config("mdm")
    export_folder(config, random_tensors(config.model), tmp_path / "hf", options=NO_TOKENIZER)
    return tmp_path / "hf"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(x=torch.ones(1)), "unknown x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\], expected \[48\]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(384, 48)}), "another lm_head.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "NaN or infinite values in model.norm.weight"),
    ],
)
def test_every_tensor_of_a_folder_is_accounted_for(exported: Path, change, message: str) -> None:
    rewrite(exported, change)
    with pytest.raises(ValueError, match=message):
        import_folder(exported)


def test_duplicates_and_derived_buffers_that_writers_add_are_understood(exported: Path) -> None:
    before = import_folder(exported)[1]
    rewrite(exported, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(exported, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    after = import_folder(exported)[1]
    assert set(before) == set(after)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.999])
def test_truncated_safetensors(exported: Path, keep: float) -> None:
    content = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"model.safetensors .* is truncated or damaged"):
        import_folder(exported)


def test_pickled_weights_are_not_touched(exported: Path) -> None:
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors only"):
        import_folder(exported)


def test_index_that_lies(tmp_path: Path) -> None:
    config = make_config("ar")
    export_folder(
        config, random_tensors(config.model), tmp_path / "hf", options=replace(NO_TOKENIZER, max_shard_size="50KB")
    )
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    other = json.loads(index.read_text())
    places = list(content["weight_map"].values())
    first = next(name for name, file in content["weight_map"].items() if places.count(file) > 1)
    other["weight_map"][first] = "../elsewhere.safetensors"
    index.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"has no ../elsewhere.safetensors"):
        import_folder(tmp_path / "hf")
    for damaged in ("{}", "[]", '{"weight_map": {"a": 1}}', "{"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json cannot be read"):
            import_folder(tmp_path / "hf")
    files = sorted(set(content["weight_map"].values()))
    other["weight_map"][first] = next(name for name in files if name != content["weight_map"][first])
    index.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="which the index does not place there"):
        import_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "is of None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"mask_token_id": 384}, "mask_token_id 384"),
        ({"num_hidden_layers": "two"}, "not a valid EuroBertConfig"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers 10000000000"),
        ({"num_hidden_layers": 10**6}, "num_layers 1000000 with 20 tensors"),
        ({"rms_norm_eps": 2.0}, "--layernorm-epsilon is 2.0"),
        ({"vocab_size": 10**19}, "vocab_size 10000000000000000000"),
        ({"hidden_size": 10**12, "head_dim": 10**12}, "hidden_size 1000000000000, head_dim 1000000000000"),
    ],
)
def test_configurations_that_we_cannot_honour(exported: Path, change: dict, message: str) -> None:
    path = exported / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_folder(exported)


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e6), ("float32", float("nan"))])
def test_weights_that_the_file_cannot_hold_are_not_exported(tmp_path: Path, dtype: str, scale: float) -> None:
    """A diverged run, or values beyond fp16."""
    config = make_config("ar")
    tensors = random_tensors(config.model)
    tensors["layers.0.mlp.dense_4h_to_h.weight"] *= scale
    with pytest.raises(ValueError, match=f"in {dtype}: NaN or infinite values in layers.0.mlp.dense_4h_to_h.weight"):
        export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, dtype=dtype))
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_folder_is_never_run(exported: Path) -> None:
    path = exported / "config.json"
    fields = json.loads(path.read_text()) | {"auto_map": {"AutoModelForMaskedLM": "evil.EuroBertForMaskedLM"}}
    path.write_text(json.dumps(fields))
    (exported / "evil.py").write_text("raise SystemExit('ran')")
    config, _ = import_folder(exported)
    assert config.objective.objective == "mdm"


def test_verification_fails_on_other_weights_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("ar")
    right = hf_folder.to_huggingface

    def swapped(tensors, model):
        out = right(tensors, model)
        name = "model.layers.0.mlp.{}_proj.weight"
        out[name.format("gate")], out[name.format("up")] = out[name.format("up")], out[name.format("gate")]
        return out

    monkeypatch.setattr(hf_folder, "to_huggingface", swapped)
    with pytest.raises(ValueError, match="largest difference of logits"):
        export_folder(config, random_tensors(config.model), tmp_path / "hf", options=replace(NO_TOKENIZER, verify=True))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("ar")
    tensors = random_tensors(config.model)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "note").write_text("mine")
    with pytest.raises(ValueError, match="is never overwritten"):
        export_folder(config, tensors, tmp_path / "hf", options=NO_TOKENIZER)
    shutil.rmtree(tmp_path / "hf")

    def full_disk(*arguments, **named):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_folder, "write_weights", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_folder(config, tensors, tmp_path / "hf", options=NO_TOKENIZER)
    assert list(tmp_path.iterdir()) == []
