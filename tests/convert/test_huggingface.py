"""Hugging Face folders: logits of transformers, generation, fill-mask, identity of import and export, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron.config.schema import Config, DataConfig
from megatron.convert import hf_folder
from megatron.convert.hf_folder import ExportOptions, compare_logits, export_folder, import_folder
from megatron.convert.hf_tokenizer import MASK_TOKEN, _byte_characters
from megatron.convert.huggingface import attention_family, kept_rows, trim_rows
from megatron.data.indexed import IndexedDatasetWriter
from megatron.model import Causal, Full, GPTModel
from megatron.model.mask import BlockDiffusion
from tests.convert.reference import make_config, random_tensors

CLASSES = {"ar": transformers.LlamaForCausalLM, "mdm": transformers.EuroBertForMaskedLM}
SHAPES = [
    {},
    {"num_query_groups": 2},
    {"num_query_groups": 1, "untie_embeddings_and_output_weights": True},
    {"kv_channels": 20, "ffn_hidden_size": 100, "rotary_base": 500.0, "layernorm_epsilon": 1e-3},
]
NO_TOKENIZER = ExportOptions(with_tokenizer=False)


def our_logits(config: Config, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    rows = tensors["word_embeddings.weight"].shape[0]
    model_config = replace(config.model, padded_vocab_size=rows)
    model = GPTModel(model_config, mask=Full() if config.objective.objective == "mdm" else Causal())
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model.eval().logits(ids)


def their_logits(objective: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = CLASSES[objective].from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def some_ids(rows: int = 300, length: int = 32) -> torch.Tensor:
    return torch.randint(0, rows, (3, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def gpt2_files(tmp_path: Path) -> DataConfig:
    """A byte-level BPE in GPT-2's two files: 256 bytes, 43 merges, end of document = 299."""
    characters = _byte_characters()
    vocab = {character: index for index, character in enumerate(characters)}
    merges = []
    words = ["th", "the", "Ġthe", "an", "and", "in", "ing", "er", "Ġa", "Ġo"]
    pairs = {"th": ("t", "h"), "the": ("th", "e"), "Ġthe": ("Ġ", "the"), "an": ("a", "n"), "and": ("an", "d"),
             "in": ("i", "n"), "ing": ("in", "g"), "er": ("e", "r"), "Ġa": ("Ġ", "a"), "Ġo": ("Ġ", "o")}  # fmt: skip
    for word in words:
        vocab[word] = len(vocab)
        merges.append(pairs[word])
    for first in "bcdfgklmpqrstuvwxyzBCDFGKLMPQRSTU":
        vocab[first + "o"] = len(vocab)
        merges.append((first, "o"))
    vocab["<|endoftext|>"] = len(vocab)
    assert len(vocab) == 300
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    return DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_size=300, **files)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_export_gives_the_same_logits_and_comes_back_bit_for_bit(tmp_path: Path, objective: str, shape: dict) -> None:
    config = make_config(objective, **shape)
    tensors = random_tensors(config.model)
    report = export_folder(config, tensors, tmp_path / "hf", options=replace(NO_TOKENIZER, verify=True))
    assert report["class"] == CLASSES[objective].__name__
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
    assert attention_family(replace(config, objective=replace(config.objective, **changes))) == family


def test_attention_that_neither_class_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(attention_mask=BlockDiffusion(4))
    monkeypatch.setattr("megatron.convert.huggingface.evaluation_objective", lambda config: other)
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


def test_ar_generates(tmp_path: Path, gpt2_files: DataConfig) -> None:
    config = replace(make_config("ar"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    inputs = tokenizer("and the thing", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    expected = inputs["input_ids"][0]
    for _ in range(6):
        nxt = our_logits(config, random_tensors(config.model), expected[None])[0, -1].argmax()
        if nxt == 299:
            break
        expected = torch.cat([expected, nxt[None]])
    assert torch.equal(out[: len(expected)], expected)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 299


def test_mdm_fills_masks(tmp_path: Path, gpt2_files: DataConfig) -> None:
    config = replace(make_config("mdm"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "hf"))
    assert fill.tokenizer.mask_token_id == fill.model.config.mask_token_id == 300
    answers = fill(f"the {fill.tokenizer.mask_token} and", top_k=3)
    ids = fill.tokenizer(f"the {MASK_TOKEN} and", return_tensors="pt")["input_ids"]
    assert (ids == 300).sum() == 1
    probabilities = our_logits(config, random_tensors(config.model), ids)[ids == 300][0].softmax(-1)
    top = probabilities.topk(3)
    assert [answer["token"] for answer in answers] == top.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("text", ["Hello world, the end", "größer — ½ 日本 \n\t x", "  two  spaces ", "don't stop"])
def test_exported_gpt2_tokenizer_gives_the_ids_of_training(tmp_path: Path, gpt2_files: DataConfig, text: str) -> None:
    from megatron.data.tokenizer import build_tokenizer

    config = replace(make_config("mdm"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = build_tokenizer(gpt2_files).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == 299


def test_exported_byte_tokenizer(tmp_path: Path) -> None:
    config = make_config("mdm", vocab_size=257)
    config = replace(config, data=DataConfig(tokenizer_type="ByteTokenizer"))
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "größer, 日本\x00\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode()), clean_up_tokenization_spaces=False) == text
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (256, 257)


def test_tokenizer_that_only_the_data_name(tmp_path: Path) -> None:
    """A run without tokenizer flags finds its tokenizer, and with it the real vocabulary, through its data."""
    prefix = str(tmp_path / "data_text_document")
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 256])
        writer.close({"format": 1, "tokenizer": {"type": "ByteTokenizer"}, "vocab_size": 257, "eod_id": 256})
    config = make_config("mdm", vocab_size=257)
    config = replace(config, data=DataConfig(train_data_path=[prefix]))
    report = export_folder(
        config, random_tensors(config.model), tmp_path / "hf", options=ExportOptions(trim_vocab=True)
    )
    assert (report["tokenizer"], report["vocab_rows"]) == (True, 258)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").mask_token_id == 257
    for file in tmp_path.glob("data_text_document.*"):
        file.unlink()
    report = export_folder(config, random_tensors(config.model), tmp_path / "hf2")
    assert report["tokenizer"] is False


def test_tokenizer_of_an_imported_folder_goes_through_unchanged(tmp_path: Path, gpt2_files: DataConfig) -> None:
    config = replace(make_config("mdm"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "a")
    back, tensors = import_folder(tmp_path / "a")
    assert (back.data.tokenizer_type, back.data.vocab_size) == ("HFTokenizer", 301)
    export_folder(back, tensors, tmp_path / "b", options=ExportOptions(origin=tmp_path / "a"))
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_mask_token_beyond_the_next_id_gets_reserved_tokens(tmp_path: Path, gpt2_files: DataConfig) -> None:
    config = replace(make_config("mdm"), data=gpt2_files)
    config = replace(config, objective=replace(config.objective, mask_token_id=310))
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.mask_token_id == 310
    assert len(tokenizer) == 311


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
    ],
)
def test_configurations_that_we_cannot_honour(exported: Path, change: dict, message: str) -> None:
    path = exported / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_folder(exported)


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
    with pytest.raises(ValueError, match="never overwrites"):
        export_folder(config, tensors, tmp_path / "hf", options=NO_TOKENIZER)
    shutil.rmtree(tmp_path / "hf")

    def full_disk(*arguments, **named):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_folder, "write_weights", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_folder(config, tensors, tmp_path / "hf", options=NO_TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_missing_gpt2_files_say_where_to_get_them(tmp_path: Path) -> None:
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_size=300))
    with pytest.raises(ValueError, match=r"download.sh --gpt2"):
        export_folder(config, random_tensors(config.model), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


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
