"""Hugging Face folders with a tokenizer: generation, fill-mask, ids as in training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron.config.schema import DataConfig
from megatron.convert.hf_folder import ExportOptions, export_folder, import_folder
from megatron.convert.hf_tokenizer import MASK_TOKEN, _byte_characters
from megatron.convert.run_folder import read_run, write_run
from megatron.data.identity import tokenizer_fingerprint
from megatron.data.prepare.bpe_training import train_bpe
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError
from megatron.inference.model import load_model
from megatron.training.configuration import recorded
from tests.convert.folders import our_logits
from tests.convert.reference import make_config, random_tensors


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


def test_the_space_before_a_mask_belongs_to_the_masked_token(tmp_path: Path, gpt2_files: DataConfig) -> None:
    """The model saw " the" as one token: with a lone space before the mask it would be asked for "the" after it."""
    config = replace(make_config("mdm"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    whole, masked = tokenizer("and the.")["input_ids"], tokenizer(f"and {MASK_TOKEN}.")["input_ids"]
    assert masked == [300 if token == tokenizer.convert_tokens_to_ids("Ġthe") else token for token in whole]
    assert masked.count(300) == 1


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_the_tokenizer_class_is_one_that_transformers_4_and_5_know(
    tmp_path: Path, gpt2_files: DataConfig, objective: str
) -> None:
    config = replace(make_config(objective), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(fields.get("extra_special_tokens", {}), list)  # transformers 4 wants a dict


def test_a_bare_tokenizer_file_gets_the_end_of_document_that_training_knows(
    tmp_path: Path, gpt2_files: DataConfig
) -> None:
    """``tokenizer.json`` does not say which of its tokens that is; without it, generation never ends."""
    export_folder(replace(make_config("ar"), data=gpt2_files), random_tensors(make_config("ar").model), tmp_path / "hf")
    for name in ("file.json", "folder/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / name)
        model = tmp_path / name if name == "file.json" else (tmp_path / name).parent
        data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(model), vocab_size=300)
        out = tmp_path / f"out-{model.name}"
        export_folder(replace(make_config("ar"), data=data), random_tensors(make_config("ar").model), out)
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 299
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 299
        if name == "file.json":  # a folder is copied byte for byte
            assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == 299


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_transformers_4_reads_the_tokenizer_and_the_causal_model(
    tmp_path: Path, gpt2_files: DataConfig, objective: str
) -> None:
    """TRANSFORMERS_4: a Python that has it."""
    python = os.environ.get("TRANSFORMERS_4")
    if not python:
        pytest.skip("TRANSFORMERS_4 names no Python with transformers 4")
    config = replace(make_config(objective), data=gpt2_files)
    tensors = random_tensors(config.model)
    export_folder(config, tensors, tmp_path / "hf")
    code = """import json, sys, torch, transformers as t
tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1])
found = {"version": t.__version__, "ids": tokenizer(sys.argv[2])["input_ids"], "eos": tokenizer.eos_token_id}
found["masked"] = tokenizer("and <|mask|>.")["input_ids"] if tokenizer.mask_token else None
if tokenizer.mask_token is None:
    model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    found["logits"] = model(torch.arange(6)[None]).logits.sum((0, 1))[:5].tolist()
print(json.dumps(found))"""
    text = " größer  the and\n\nfoo\t日本 "
    done = subprocess.run([python, "-c", code, str(tmp_path / "hf"), text], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (found["version"][:2], found["ids"], found["eos"]) == ("4.", ours(text)["input_ids"], 299)
    if objective == "mdm":
        assert found["masked"] == ours("and <|mask|>.")["input_ids"]
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert found["logits"] == pytest.approx(model(torch.arange(6)[None]).logits.sum((0, 1))[:5].tolist(), abs=1e-4)


def test_tokenizer_that_only_the_data_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without tokenizer flags finds its tokenizer, and with it the real vocabulary, through its data; but not where they
    were made with another one since."""
    prefix, meta = tmp_path / "data_text_document", {"tokenizer": {"type": "ByteTokenizer"}, "vocab_size": 257}
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        writer.add_document([1, 2, 256])
        writer.close({**meta, "eod_id": 256})
    config = replace(make_config("mdm", vocab_size=257), data=DataConfig(train_data_path=[str(prefix)]))
    own = {"tokenizer": {"vocab_size": 257, "fingerprint": tokenizer_fingerprint(ByteTokenizer())}}
    tensors = random_tensors(config.model)
    write_run(tmp_path / "run", config, tensors, step=1, source="", more=own)
    options = ExportOptions(trim_vocab=True)
    report = export_folder(*read_run(tmp_path / "run")[:2], tmp_path / "hf", options=options)
    assert (report["tokenizer"], report["vocab_rows"]) == (True, 258)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").mask_token_id == 257
    bpe = train_bpe(["one two three"] * 3, vocab_size=257, folder=tmp_path / "bpe")
    assert bpe.vocab_size == 257
    Path(f"{prefix}.meta.json").write_text(json.dumps({"tokenizer": bpe.spec, "vocab_size": 257}))
    report = export_folder(*read_run(tmp_path / "run")[:2], tmp_path / "hf1")
    assert report["tokenizer"] is False
    assert "no tokenizer: HFTokenizer(bpe) is not the tokenizer of the run" in capsys.readouterr().err
    named = replace(config, data=DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(tmp_path / "bpe")))
    write_run(tmp_path / "named", named, tensors, step=1, source="", more=own)  # and its files were replaced
    assert export_folder(*read_run(tmp_path / "named")[:2], tmp_path / "hf3")["tokenizer"] is False
    for file in tmp_path.glob("data_text_document.*"):
        file.unlink()
    report = export_folder(*read_run(tmp_path / "run")[:2], tmp_path / "hf2")
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


def test_missing_gpt2_files_say_where_to_get_them(tmp_path: Path) -> None:
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_size=300))
    with pytest.raises(ValueError, match=r"download.sh --gpt2"):
        export_folder(config, random_tensors(config.model), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_ids_than_the_model_knows_is_refused(tmp_path: Path, gpt2_files: DataConfig) -> None:
    """The folder was written: ids without a row, or a token of the text as the mask."""
    config = replace(make_config("mdm"), data=gpt2_files)
    export_folder(config, random_tensors(config.model), tmp_path / "hf")  # 301 ids with the mask
    options = ExportOptions(tokenizer=str(tmp_path / "hf"))
    for other in (make_config("ar"), make_config("mdm")):
        less = replace(other, data=DataConfig(tokenizer_type="NullTokenizer", vocab_size=257))
        less = replace(
            less, objective=replace(less.objective, mask_token_id=257 if other.objective.mask_token_id else None)
        )
        with pytest.raises(UserError, match="the tokenizer has 301 ids, and the model knows 25"):
            export_folder(less, random_tensors(less.model), tmp_path / "out", options=options)
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    """A traceback of 80 lines."""
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="ByteTokenizer", vocab_size=257))
    with pytest.raises(UserError, match="the tokenizer no/such cannot be loaded"):
        export_folder(config, random_tensors(config.model), tmp_path / "hf", options=ExportOptions(tokenizer="no/such"))


def test_an_imported_run_knows_its_tokenizer_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path stood in its configuration: `no tokenizer` from another working directory."""
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="ByteTokenizer", vocab_size=257))
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    back, tensors = import_folder("hf")
    write_run("run", back, tensors, step=0, source="hf", origin=Path("hf"))
    monkeypatch.chdir("/")
    assert read_run(tmp_path / "run")[0].data.tokenizer_model == str(tmp_path / "run" / "huggingface")


def test_an_imported_run_keeps_its_tokenizer_when_it_is_moved(tmp_path: Path) -> None:
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="ByteTokenizer", vocab_size=257))
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    back, tensors = import_folder(tmp_path / "hf")
    write_run(tmp_path / "run", back, tensors, step=0, source="hf", origin=tmp_path / "hf")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere/run")
    (tmp_path / "link").symlink_to(moved)
    for place in (moved, moved / "global_step0", tmp_path / "link"):
        found = read_run(place)[0].data.tokenizer_model
        assert found == str(moved / "huggingface")
        loaded = load_model(place)
        assert loaded.tokenizer is not None and loaded.tokenizer.vocab_size == 257
    assert recorded(str(moved), None)["config"]["data"]["tokenizer_model"] == str(moved / "huggingface")  # for training


def test_the_older_name_of_the_dtype_does_not_stay(tmp_path: Path) -> None:
    config = replace(make_config("ar"), data=DataConfig(tokenizer_type="ByteTokenizer", vocab_size=257))
    export_folder(config, random_tensors(config.model), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**fields, "torch_dtype": fields.pop("dtype")}))
    back, tensors = import_folder(tmp_path / "hf")
    options = ExportOptions(dtype="bfloat16", origin=tmp_path / "hf")
    export_folder(back, tensors, tmp_path / "again", options=options)
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["dtype"] == "bfloat16" and "torch_dtype" not in fields
