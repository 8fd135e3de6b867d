"""Hugging Face folders: logits of transformers, identity of import and export, shards, trimmed vocabularies."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron.checkpoint.tensors import save_full_checkpoint
from megatron.convert.hf_folder import compare_logits, export_folder, import_folder
from megatron.convert.huggingface import attention_family, kept_rows, trim_rows
from megatron.objectives.block_diffusion import BlockMaskedDiffusion
from tests.convert.folders import NO_TOKENIZER, our_logits, some_ids
from tests.convert.reference import make_config, random_tensors

CLASSES = {"ar": "LlamaForCausalLM", "mdm": "EuroBertForMaskedLM"}  # by name: the classes take seconds to load
SHAPES = [
    {},
    {"num_query_groups": 2},
    {"num_query_groups": 1, "untie_embeddings_and_output_weights": True},
    {"kv_channels": 20, "ffn_hidden_size": 100, "rotary_base": 500.0, "layernorm_epsilon": 1e-3},
]


def their_logits(objective: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = getattr(transformers, CLASSES[objective]).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("objective", ["ar", "mdm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_export_gives_the_same_logits_and_comes_back_bit_for_bit(tmp_path: Path, objective: str, shape: dict) -> None:
    config = make_config(objective, **shape)
    tensors = random_tensors(config.model)
    report = export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, verify=True))
    assert report["class"] == CLASSES[objective]
    assert report["verified"] <= 1e-5
    ids = some_ids(384)  # padding rows included
    ours = our_logits(config, tensors, ids)
    assert ours.abs().max() > 0.5
    assert (ours - their_logits(objective, tmp_path / "hf", ids)).abs().max() < 1e-5
    back, again = import_folder(tmp_path / "hf")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert back.model == replace(config.model, hidden_dropout=0.0)
    assert back.objective == config.objective
    export_folder(back, again, tmp_path / "hf2", options=NO_TOKENIZER)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize("objective", ["ar", "mdm"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_transformers_come_in_and_go_out_unchanged(
    tmp_path: Path, objective: str, tied: bool, dtype: torch.dtype
) -> None:
    """A model that transformers made: an odd vocabulary, grouped queries, its own special tokens."""
    fields = {
        "vocab_size": 301, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 40, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if objective == "mdm":
        theirs = transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(**fields, mask_token_id=300))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, attention_dropout=0.25))
    theirs.to(dtype).save_pretrained(tmp_path / "in")
    config, tensors = import_folder(tmp_path / "in")
    assert config.model.padded_vocab_size == 301
    assert config.run.bf16 == (dtype == torch.bfloat16)
    assert config.objective.mask_token_id == (300 if objective == "mdm" else None)
    assert compare_logits(config, tensors, tmp_path / "in") < 1e-5
    ids = some_ids(301)
    assert (our_logits(config, tensors, ids) - their_logits(objective, tmp_path / "in", ids)).abs().max() < 1e-5
    export_folder(config, tensors, tmp_path / "out", options=replace(NO_TOKENIZER, origin=tmp_path / "in"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert new == old


@pytest.mark.parametrize("window", [None, 40, 16])
def test_mistral_without_an_effective_window_is_llama(tmp_path: Path, window: int | None) -> None:
    """Its configuration keeps its own name on the way back; a window that cuts the context is refused."""
    fields = {
        "vocab_size": 301, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40, "hidden_act": "swish",
    }  # fmt: skip
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**fields, sliding_window=window))
    theirs.save_pretrained(tmp_path / "in")
    if window == 16:
        with pytest.raises(ValueError, match=r"sliding_window 16 \(must be None\)"):
            import_folder(tmp_path / "in")
        return
    config, tensors = import_folder(tmp_path / "in")
    assert compare_logits(config, tensors, tmp_path / "in") < 1e-5
    options = replace(NO_TOKENIZER, origin=tmp_path / "in", verify=True)
    assert export_folder(config, tensors, tmp_path / "out", options=options)["verified"] < 1e-5
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert new == old


def test_a_mistral_configuration_that_leaves_its_window_to_the_default_has_one(tmp_path: Path) -> None:
    config = make_config("ar")
    export_folder(config, random_tensors(config.model), tmp_path / "hf", options=NO_TOKENIZER)
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text()) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    path.write_text(json.dumps(fields | {"max_position_embeddings": 8192}))
    with pytest.raises(ValueError, match="sliding_window 4096"):
        import_folder(tmp_path / "hf")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes 0600: colleagues could not read an export, nor the shards of a checkpoint."""
    config = make_config("ar")
    before = os.umask(umask)
    try:
        export_folder(config, random_tensors(config.model), tmp_path / "hf", options=NO_TOKENIZER)
        save_full_checkpoint(tmp_path / "run", config, random_tensors(config.model))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_causality_is_that_of_the_objective(tmp_path: Path) -> None:
    """Changing the last token changes earlier logits of EuroBert and not of Llama."""
    for objective in ("ar", "mdm"):
        config = make_config(objective)
        export_folder(config, random_tensors(config.model), tmp_path / objective, options=NO_TOKENIZER)
        ids = some_ids()
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % 300
        first, second = (their_logits(objective, tmp_path / objective, each)[:, :-1] for each in (ids, other))
        assert torch.equal(first, second) == (objective == "ar")


@pytest.mark.parametrize(
    ("objective", "changes", "family"),
    [
        ("ar", {}, "ar"),
        ("permuted_ar", {"num_order_list": 4}, "ar"),
        ("masked_attention_ar", {"randmask_ratio": 0.5}, "ar"),
        ("mdm", {}, "mdm"),
    ],
)
def test_family_follows_the_attention_of_evaluation(objective: str, changes: dict, family: str) -> None:
    config = make_config(objective)
    assert (
        attention_family(replace(config, objective=replace(config.objective, objective=objective, options=changes)))
        == family
    )


def test_attention_that_neither_class_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = BlockMaskedDiffusion(mask_token_id=300, global_batch_size=1, seed=1, block_size=4)
    monkeypatch.setattr("megatron.convert.huggingface.build_objective", lambda config: other)
    with pytest.raises(ValueError, match="evaluates with BlockDiffusion attention"):
        attention_family(make_config("ar"))


def test_bf16_runs_are_exported_as_they_compute(tmp_path: Path) -> None:
    config = make_config("ar", bf16=True)
    tensors = random_tensors(config.model)
    report = export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, verify=True))
    assert report["dtype"] == "bfloat16"
    assert report["verified"] < 1e-5
    back, again = import_folder(tmp_path / "hf")
    assert back.run.bf16
    assert all(torch.equal(again[name], tensors[name].bfloat16().float()) for name in tensors)
    full = export_folder(config, tensors, tmp_path / "full", options=replace(NO_TOKENIZER, dtype="float32"))
    assert full["dtype"] == "float32"
    assert torch.equal(import_folder(tmp_path / "full")[1]["word_embeddings.weight"], tensors["word_embeddings.weight"])


def test_sharded_weights(tmp_path: Path) -> None:
    config = make_config("ar", num_layers=4)
    tensors = random_tensors(config.model)
    export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, max_shard_size="100KB", verify=True))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    _, again = import_folder(tmp_path / "hf")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("objective", "rows"), [("ar", 300), ("mdm", 301)])
@pytest.mark.parametrize("untied", [False, True])
def test_trimming_keeps_tokens_and_mask(tmp_path: Path, objective: str, rows: int, untied: bool) -> None:
    config = make_config(objective, untie_embeddings_and_output_weights=untied)
    tensors = random_tensors(config.model)
    report = export_folder(
        config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, trim_vocab=True, verify=True)
    )
    assert report["vocab_rows"] == kept_rows(config, 384) == rows
    ids = some_ids(rows)
    theirs = their_logits(objective, tmp_path / "hf", ids)
    assert theirs.shape[-1] == rows
    assert (our_logits(config, tensors, ids)[..., :rows] - theirs).abs().max() < 1e-5
    _, again = import_folder(tmp_path / "hf")
    assert all(torch.equal(again[name], tensor) for name, tensor in trim_rows(tensors, rows).items())


def test_verification_allows_what_rounding_does_and_no_more(tmp_path: Path) -> None:
    """Weights so large that fp32 itself is off by more than 1e-5: the export is right, and a wrong one is still seen."""
    config = make_config("ar", num_layers=8)
    tensors = {
        name: tensor * (1.0 if "layernorm" in name else 12.0) for name, tensor in random_tensors(config.model).items()
    }
    report = export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, verify=True))
    largest = float(our_logits(config, tensors, some_ids()).abs().max())
    assert report["verified"] > 1e-5 * largest, "choose larger weights: this tests nothing otherwise"
    wrong = {name: tensor.clone() for name, tensor in tensors.items()}
    wrong["layers.3.self_attention.dense.weight"][0, 0] += 1.0
    with pytest.raises(ValueError, match="largest difference of logits"):
        compare_logits(config, wrong, tmp_path / "hf")
