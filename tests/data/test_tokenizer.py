"""Tokenizers: round trips, the golden encoding, the choice from flags and from the data."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import DataConfig
from megatron.data.identity import check_vocabulary, tokenizer_fingerprint
from megatron.data.indexed import IndexedDataset
from megatron.data.prepare.bpe_training import train_bpe
from megatron.data.prepare.preprocess import portable_spec
from megatron.data.tokenizer import (
    ByteTokenizer,
    NullTokenizer,
    Tokenizer,
    build_tokenizer,
    gpt2_bpe,
    hf_tokenizer,
    tokenizer_from_spec,
)
from megatron.errors import UserError

from .conftest import GOLDEN

TEXTS = [
    "Hello, world! It's 3 o'clock.",
    "  two  spaces\n\n\tand a tab ",
    "naïve café — “quotes” … Ünïcödé 日本語 🙂\u00a0x",
    "def f(x):\r\n    return x**2  # <|endoftext|> is text here",
    "",
    "a",
]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    words = random.Random(0).choices(["low", "lower", "newest", "widest", "é", "the"], k=3000)
    train_bpe([" ".join(words)], vocab_size=300, folder=folder)
    return str(folder)


def check(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(TEXTS)
    assert batch == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS
    ids = [i for text in batch for i in text]
    assert all(isinstance(i, int) for i in ids)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eod_id not in ids  # a document cannot forge an end of document
    assert tokenizer.eod_id is not None
    assert tokenizer.eod_id < tokenizer.vocab_size
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec)))
    assert again.encode_batch(TEXTS) == batch
    assert (again.vocab_size, again.eod_id, again.name) == (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.name)
    # Ids above the vocabulary (mask, padding) give no text and no error.
    assert tokenizer.decode([*batch[0], tokenizer.vocab_size, tokenizer.vocab_size + 5]) == TEXTS[0]


def test_gpt2(gpt2_files: tuple[str, str]) -> None:
    tokenizer = gpt2_bpe(*gpt2_files)
    check(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_gpt2_gives_the_tokens_of_megatron(gpt2_files: tuple[str, str]) -> None:
    lines = (GOLDEN / "golden.jsonl").read_text().splitlines()
    encoded = gpt2_bpe(*gpt2_files).encode_batch([json.loads(line)["text"] for line in lines])
    data = IndexedDataset(GOLDEN / "golden_text_document")
    assert len(encoded) == len(data)
    for index, ids in enumerate(encoded):
        np.testing.assert_array_equal([*ids, 50256], data[index])


def test_trained_bpe(bpe_folder: str) -> None:
    tokenizer = hf_tokenizer(bpe_folder)
    check(tokenizer)
    assert tokenizer.vocab_size <= 300
    assert tokenizer.eod_id == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert len(tokenizer.encode("lower newest")) < 6
    assert tokenizer.encode("lower") == hf_tokenizer(bpe_folder + "/tokenizer.json").encode("lower")


def test_trained_bpe_opens_in_transformers(bpe_folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(bpe_folder)
    assert other.eos_token_id == 0
    ours = hf_tokenizer(bpe_folder)
    for text in TEXTS[:3]:
        assert other(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_training_is_deterministic_and_replaces_atomically(tmp_path: Path) -> None:
    texts = [" ".join(random.Random(seed).choices(["alpha", "beta", "gamma", "delta"], k=500)) for seed in range(5)]
    first = train_bpe(texts, vocab_size=290, folder=tmp_path / "t")
    before = (tmp_path / "t" / "tokenizer.json").read_bytes()
    train_bpe(texts, vocab_size=290, folder=tmp_path / "t")
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert 257 < first.vocab_size <= 290
    with pytest.raises(ValueError, match="needs 257 ids"):
        train_bpe(texts, vocab_size=256, folder=tmp_path / "u")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; it would be overwritten"):
        train_bpe(texts, vocab_size=290, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_truncation_in_a_tokenizer_json_is_ignored(bpe_folder: str, tmp_path: Path) -> None:
    raw = json.loads(Path(bpe_folder, "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    raw["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "lower newest widest the low"
    assert hf_tokenizer(str(tmp_path)).encode(text) == hf_tokenizer(bpe_folder).encode(text)
    assert hf_tokenizer(str(tmp_path)).encode("a") == hf_tokenizer(bpe_folder).encode("a")


def test_a_tokenizer_without_tokens_has_none(bpe_folder: str, tmp_path: Path) -> None:
    raw = json.loads((Path(bpe_folder) / "tokenizer.json").read_text())
    raw["added_tokens"], raw["model"]["vocab"], raw["model"]["merges"] = [], {}, []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert hf_tokenizer(str(tmp_path)).vocab_size == 0


def test_files_below_home(gpt2_files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were found, and then not read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, file in zip(("vocab.json", "merges.txt"), gpt2_files):
        shutil.copy(file, tmp_path / name)
    assert gpt2_bpe("~/vocab.json", "~/merges.txt").encode("lower") == gpt2_bpe(*gpt2_files).encode("lower")


def test_special_tokens_of_a_folder(bpe_folder: str, tmp_path: Path) -> None:
    shutil.copytree(bpe_folder, tmp_path / "t")
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for index, name in enumerate(("<end>", "[MASK]")):
        token = {"id": 400 + index, "content": name, "special": True, "normalized": False}
        raw["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    tokenizer = hf_tokenizer(str(tmp_path / "t"))
    assert tokenizer.decode([tokenizer.eod_id or 0]) == "<end>"
    mask = tokenizer.vocabulary()["[MASK]"]
    assert tokenizer.decode([mask]) == "[MASK]"
    assert tokenizer.vocab_size > max(tokenizer.eod_id or 0, mask)
    check(tokenizer)


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=320, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        user_defined_symbols=["<mask>", "\n", "\t", "\r"], hard_vocab_limit=False,
    )  # fmt: skip
    config = DataConfig(tokenizer_type="sentencepiecetokenizer", tokenizer_model=str(tmp_path / "sp.model"))
    tokenizer = build_tokenizer(config)
    check(tokenizer)
    assert tokenizer.eod_id == 2


def test_bytes_and_null() -> None:
    tokenizer = ByteTokenizer()
    check(tokenizer)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    null = NullTokenizer(100)
    assert null.encode("5 99 0") == [5, 99, 0]
    assert null.decode([5, 99]) == "5 99"
    for text in ("100", "-1", "x", "1.5", "9" * 5000, "٣", "²"):
        with pytest.raises(ValueError, match="is no token id; NullTokenizer reads ids 0 to 99"):
            null.encode(text)


def data_with_meta(make_data, tokenizer: Tokenizer, name: str = "data") -> str:
    prefix = make_data(name, [50])
    meta = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    meta["tokenizer"] = portable_spec(tokenizer, Path(prefix).parent)
    Path(prefix + ".meta.json").write_text(json.dumps(meta))
    return prefix


def test_the_data_names_its_tokenizer(
    make_data, bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bpe_folder, tmp_path / "tok")
    prefix = data_with_meta(make_data, hf_tokenizer(str(tmp_path / "tok")))
    assert build_tokenizer(DataConfig(train_data_path=[prefix])).name == "HFTokenizer(tok)"
    (tmp_path / "paths").write_text(f'"1.0 {prefix}"')
    assert build_tokenizer(DataConfig(valid_data_path_file=str(tmp_path / "paths"))).name == "HFTokenizer(tok)"
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    shutil.copytree(tmp_path, moved)  # data and tokenizer move together
    shutil.rmtree(tmp_path / "tok")
    monkeypatch.chdir(moved)
    assert build_tokenizer(DataConfig(train_data_path=["data"])).name == "HFTokenizer(tok)"


def test_a_tokenizer_that_is_named_is_that_one_whatever_the_data_say(make_data, bpe_folder: str) -> None:
    """A model could not be asked any more when its data had been made anew; that they belong together is checked before
    they are read (``check_vocabulary``)."""
    prefix = data_with_meta(make_data, ByteTokenizer())
    tokenizer = build_tokenizer(DataConfig(train_data_path=[prefix], tokenizer_model=bpe_folder))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(hf_tokenizer(bpe_folder))
    with pytest.raises(UserError, match="the tokenizer of this run has a vocabulary of 300 ids"):
        check_vocabulary([prefix], vocab_size=300, fingerprints=[tokenizer_fingerprint(tokenizer)])


def test_wrong_flags(make_data, bpe_folder: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    text = str(tmp_path / "text")
    cases = {
        "no tokenizer: neither a flag nor the data": DataConfig(train_data_path=[make_data("x", [5])]),
        "GPT2BPETokenizer without --merge-file": DataConfig(vocab_file=text),
        "--vocab-file .*absent does not exist": DataConfig(vocab_file=str(tmp_path / "absent"), merge_file=text),
        "cannot read a BPE": DataConfig(vocab_file=text, merge_file=text),
        "vocab_file .*GPT2|tokenizer_model .* does not read it|model .* does not read it": DataConfig(
            vocab_file=text, merge_file=text, tokenizer_model=bpe_folder
        ),
        "must be a tokenizer.json": DataConfig(tokenizer_model=text),
        "no tokenizer.json in": DataConfig(tokenizer_model=str(tmp_path)),
        "a path must be a folder or a file": DataConfig(tokenizer_model="./absent"),
        "--vocab-size 5, but ByteTokenizer has 257": DataConfig(tokenizer_type="ByteTokenizer", vocab_size=5),
        "NullTokenizer without --vocab-size": DataConfig(tokenizer_type="NullTokenizer"),
        "tokenizer type 'Bert'; it must be one of": DataConfig(tokenizer_type="Bert"),
        "must be a SentencePiece model": DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=text),
        "--tokenizer-model .*absent does not exist": DataConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "absent")
        ),
    }
    for message, config in cases.items():
        with pytest.raises(ValueError, match=message):
            build_tokenizer(config)


def test_null_tokenizer_needs_only_a_size(make_data) -> None:
    config = DataConfig(train_data_path=[make_data("x", [5])], tokenizer_type="NullTokenizer", vocab_size=77)
    tokenizer = build_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (77, None)


def test_a_hub_name_is_read_from_the_cache_of_the_hub(
    bpe_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="tokenizer me/bpe: no such file or folder, and the hub gave LocalEntryNotFound"
    ):
        hf_tokenizer("me/bpe")
    kept = tmp_path / "models--me--bpe"
    shutil.copytree(bpe_folder, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    found = hf_tokenizer("me/bpe")
    assert (found.spec["model"], found.eod_id) == ("me/bpe", 0)
    assert found.encode("lower") == hf_tokenizer(bpe_folder).encode("lower")
