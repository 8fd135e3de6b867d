"""Data and vocabularies are known by content, and belong together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data import identity
from megatron.data.identity import (
    check_apart,
    check_tokenizer,
    check_vocabulary,
    data_fingerprint,
    selection_half,
    tokenizer_fingerprint,
    verify_data,
)
from megatron.data.indexed import DamagedData, IndexedDataset
from megatron.data.prepare.bpe_training import train_bpe
from megatron.data.prepare.preprocess import PreprocessOptions, preprocess
from megatron.data.prepare.readers import Source
from megatron.data.prepare.subset import Selection, subset_indexed
from megatron.data.tokenizer import ByteTokenizer, NullTokenizer, Tokenizer, gpt2_bpe, hf_tokenizer, tokenizer_from_spec
from megatron.errors import UserError
from megatron.files import sha256_of
from megatron.statistics import fingerprint, half_of

TEXTS = ["one two three", "four five", "größer 第 six"]


def encode(folder: Path, name: str, tokenizer: Tokenizer, texts: list[str] = TEXTS) -> str:
    """Preprocess texts; return the prefix."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PreprocessOptions(str(folder / name), append_eod=tokenizer.eod_id is not None)
    preprocess([Source(source, "jsonl")], tokenizer, options)
    return options.prefix("text")


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    return train_bpe(TEXTS * 3, vocab_size=270, folder=tmp_path / "bpe")


def without(prefix: str, *entries: str) -> str:
    """Make the metadata of a data set older: without some entries and without a checksum."""
    path = Path(prefix + ".meta.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in meta.items() if key not in (*entries, "sha256")}))
    return prefix


def test_a_tokenizer_is_known_by_its_vocabulary(tmp_path: Path, bpe: Tokenizer, gpt2_files: tuple[str, str]) -> None:
    shutil.copytree(tmp_path / "bpe", tmp_path / "moved")
    moved = hf_tokenizer(str(tmp_path / "moved"))
    assert (
        tokenizer_fingerprint(bpe)
        == tokenizer_fingerprint(moved)
        == tokenizer_fingerprint(tokenizer_from_spec(moved.spec))
    )
    other = train_bpe([text.upper() for text in TEXTS] * 3, vocab_size=270, folder=tmp_path / "other")
    found = {tokenizer_fingerprint(kind) for kind in (bpe, other, ByteTokenizer(), gpt2_bpe(*gpt2_files))}
    assert len(found) == 4 and all(len(fingerprint) == 32 for fingerprint in found)
    assert tokenizer_fingerprint(NullTokenizer(4000)) == "ids:4000"


def test_preprocessing_and_subsets_record_the_fingerprint(tmp_path: Path, bpe: Tokenizer) -> None:
    prefix = encode(tmp_path, "x", bpe)
    subset_indexed(prefix, str(tmp_path / "part"), Selection(documents=2))
    for path in (prefix, str(tmp_path / "part")):
        meta = json.loads(Path(path + ".meta.json").read_text())
        assert meta["tokenizer_fingerprint"] == tokenizer_fingerprint(bpe)
        assert meta["digests"]["bin"] == sha256_of(path + ".bin")
        assert meta["largest_id"] == max(int(IndexedDataset(path)[index].max()) for index in range(2))


def test_data_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, other = encode(tmp_path, "x", ByteTokenizer()), encode(tmp_path, "y", ByteTokenizer(), ["another"])
    os.symlink(tmp_path, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    records = data_fingerprint(["0.6", "link/x_text_document", "1.4", "y_text_document.bin"])
    assert [record["prefix"] for record in records] == [prefix, other]
    assert [record["weight"] for record in records] == pytest.approx([0.3, 0.7])
    assert (records[0]["documents"], records[0]["tokens"]) == (3, IndexedDataset(prefix).num_tokens)
    assert records[0]["idx_sha256"] == sha256_of(prefix + ".idx") != records[1]["idx_sha256"]
    assert json.loads(json.dumps(records)) == records


class Vocabulary(NullTokenizer):
    """A tokenizer of these tokens."""

    def __init__(self, **ids: int) -> None:
        super().__init__(len(ids))
        self._ids = ids

    def vocabulary(self) -> dict[str, int]:
        return self._ids


def test_tokens_that_stand_for_no_text_can_be_left_out() -> None:
    plain, masked = Vocabulary(a=0, b=1), Vocabulary(a=0, b=1, mask=2)
    assert tokenizer_fingerprint(masked, without={2}) == tokenizer_fingerprint(plain) != tokenizer_fingerprint(masked)


def test_a_tokenizer_is_compared_by_what_is_known_of_the_recorded_one() -> None:
    own = Vocabulary(a=0, b=1)
    for known in ({}, {"vocab_size": 2}, {"vocab_size": 2, "fingerprint": tokenizer_fingerprint(own)}):
        check_tokenizer(own, known)
    for other in ({"vocab_size": 3}, {"vocab_size": 2, "fingerprint": "other"}):
        with pytest.raises(UserError, match="is not the tokenizer of the run"):
            check_tokenizer(own, other)


def test_tokens_all_over_a_long_file_are_compared(make_data: Callable[..., str]) -> None:
    prefix = make_data("x", [300_000])
    (before,) = data_fingerprint([prefix])
    for place in (0, 150_000, 299_999):
        raw = bytearray(Path(f"{prefix}.bin").read_bytes())
        raw[4 * place] ^= 1
        Path(f"{prefix}.bin").write_bytes(raw)
        (now,) = data_fingerprint([prefix])
        assert now["idx_sha256"] == before["idx_sha256"] and now["bin_sample"] != before["bin_sample"]
        before = now


def test_halves_of_several_parts_stand_one_after_the_other(make_data: Callable[..., str]) -> None:
    parts = [IndexedDataset(make_data(name, sizes)) for name, sizes in (("x", [3, 4, 5, 6, 7]), ("y", [9, 8, 2, 1]))]
    documents = [part[index] for part in parts for index in range(len(part))]
    assert selection_half(*parts).tolist() == [half_of(fingerprint(tokens)) == "selection" for tokens in documents]


def test_where_fingerprints_are_known_they_decide_alone(tmp_path: Path, bpe: Tokenizer) -> None:
    train, valid = encode(tmp_path, "train", bpe), encode(tmp_path, "valid", bpe)
    path = Path(f"{valid}.meta.json")
    meta = {**json.loads(path.read_text()), "eod_id": 1}  # as of a version that ended documents otherwise
    path.write_text(json.dumps({name: value for name, value in meta.items() if name != "sha256"}))
    check_vocabulary([train], [valid], vocab_size=270)


def test_validation_data_of_another_tokenizer_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    train, valid = encode(tmp_path, "train", bpe), encode(tmp_path, "valid", ByteTokenizer())
    with pytest.raises(
        UserError, match=r"valid_text_document was made with a vocabulary of 257 ids.*train_text_document"
    ):
        check_vocabulary([train], [valid], vocab_size=270)
    with pytest.raises(UserError, match=r"valid_text_document was made with .*the tokenizer of this run has"):
        check_vocabulary([train], [valid], vocab_size=270, fingerprints=[tokenizer_fingerprint(bpe)])
    check_vocabulary([train], [train], vocab_size=270, fingerprints=[tokenizer_fingerprint(bpe)])
    check_vocabulary(["0.5", train, "0.5", train], [], vocab_size=270)


def test_two_vocabularies_of_one_size_are_told_apart(tmp_path: Path, bpe: Tokenizer) -> None:
    other = train_bpe([text.upper() for text in TEXTS] * 3, vocab_size=bpe.vocab_size, folder=tmp_path / "other")
    assert other.vocab_size == bpe.vocab_size
    train, valid = encode(tmp_path, "train", bpe), encode(tmp_path, "valid", other)
    with pytest.raises(UserError, match="ids must mean one thing"):
        check_vocabulary([train], [valid], vocab_size=270)


def test_older_metadata_without_a_fingerprint_are_accepted(tmp_path: Path, bpe: Tokenizer) -> None:
    train, valid = encode(tmp_path, "train", bpe), encode(tmp_path, "valid", bpe)
    fingerprint = tokenizer_fingerprint(bpe)
    for prefix in (train, valid):
        without(prefix, "tokenizer_fingerprint", "digests", "largest_id")
        check_vocabulary([train], [valid], vocab_size=270, fingerprints=[fingerprint])
        check_vocabulary([train], [valid], vocab_size=270)
    byte = without(encode(tmp_path, "byte", ByteTokenizer()), "tokenizer_fingerprint")
    with pytest.raises(UserError, match="byte_text_document was made with a vocabulary of 257 ids"):
        check_vocabulary([train], [byte], vocab_size=270)


@pytest.mark.parametrize("recorded", [True, False])
def test_ids_outside_the_vocabulary_name_the_file(tmp_path: Path, recorded: bool) -> None:
    prefix = encode(tmp_path, "x", NullTokenizer(4000), ["1 2 3990", "7 8"])
    if not recorded:
        without(prefix, "largest_id")
    with pytest.raises(UserError, match=r"x_text_document\.bin holds the id 3990; .*vocabulary, 3990;"):
        check_vocabulary([prefix], vocab_size=3990, fingerprints=["ids:3990"])
    check_vocabulary([prefix], vocab_size=3991, fingerprints=["ids:3991"])
    check_vocabulary([prefix], vocab_size=3991)
    os.unlink(prefix + ".meta.json")  # published data have none
    with pytest.raises(UserError, match="holds the id 3990"):
        check_vocabulary([prefix], vocab_size=3990)


def test_negative_ids_name_the_file(make_data: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"x\.bin holds the id -2; no id is negative"):
        check_vocabulary([make_data("x", [5], start=-2)], vocab_size=3990)
    check_vocabulary([make_data("y", [0], meta={})], vocab_size=3990)  # no tokens, recorded as the largest id -1


def test_of_large_files_without_a_record_blocks_of_every_part_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_data: Any
) -> None:
    prefix = make_data("x", [1000])  # 4,000 bytes, ids 0 … 999
    monkeypatch.setattr(identity, "_BLOCK_BYTES", 40)
    monkeypatch.setattr(identity, "SCAN_LIMIT_BYTES", 400)
    blocks = list(identity._blocks(prefix))
    assert [block[0] for block in blocks] == list(range(0, 1000, 100)) and {len(block) for block in blocks} == {10}
    monkeypatch.setattr(identity, "SCAN_LIMIT_BYTES", 4000)
    assert np.concatenate(list(identity._blocks(prefix))).tolist() == list(range(1000))


def test_verification_reads_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = encode(tmp_path, "x", ByteTokenizer())
    verify_data([prefix], [])
    assert f"{prefix}: intact" in capsys.readouterr().out
    raw = bytearray(Path(prefix + ".bin").read_bytes())
    raw[10] ^= 4
    Path(prefix + ".bin").write_bytes(raw)
    with pytest.raises(DamagedData, match=r"x_text_document\.bin is not as it was written"):
        verify_data([prefix])
    with pytest.raises(UserError, match=r"records no digests; .*--record"):
        verify_data([without(prefix, "digests")])


def test_data_of_equal_lengths_and_other_tokens_are_no_copy(make_data: Callable[..., str]) -> None:
    train, valid = (data_fingerprint([make_data(name, [5, 7], start=at)]) for name, at in (("one", 0), ("two", 1)))
    assert train[0]["idx_sha256"] == valid[0]["idx_sha256"]
    check_apart(train, valid)
    with pytest.raises(UserError, match="are the training data"):
        check_apart(train, data_fingerprint([make_data("three", [5, 7])]))


def test_parts_with_documents_in_common_are_refused(make_data: Callable[..., str]) -> None:
    prefix = make_data("one", [5, 7, 3, 4])
    (first, second, both, whole) = (
        data_fingerprint([name]) for name in (f"{prefix}@0:0.5", f"{prefix}@0.5:1", f"{prefix}@0.2:0.8", prefix)
    )
    assert (first[0]["part"], first[0]["documents"], first[0]["tokens"]) == ([0, 2], 2, 12)
    assert first[0]["bin_sample"] != second[0]["bin_sample"] and "part" not in whole[0]
    check_apart(first, second)
    for train, valid in ((first, both), (both, second), (whole, second), (first, whole)):
        with pytest.raises(UserError, match="are the training data"):
            check_apart(train, valid)
    check_apart(first, data_fingerprint([make_data("two", [5, 7, 3, 4], start=1)]))
