"""Token files: Megatron's are read, damage is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.data import indexed
from megatron.data.indexed import DamagedData, IndexedDataset, read_meta
from megatron.errors import UserError

from .conftest import GOLDEN


def test_reads_what_megatron_wrote() -> None:
    with np.load(GOLDEN / "rand_docs.npz") as documents:
        data = IndexedDataset(GOLDEN / "rand_text_document")
        assert data.dtype == np.uint16
        np.testing.assert_array_equal(data.sizes, documents["lens"])
        np.testing.assert_array_equal(np.concatenate([data[i] for i in range(len(data))]), documents["flat"])


def test_missing_prefix_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nothing\.idx does not exist;.*PREFIX\.bin and PREFIX\.idx;.*preprocess_data"
    ):
        IndexedDataset(tmp_path / "nothing")


def test_missing_bin_is_named(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [3])
    os.unlink(prefix + ".bin")
    with pytest.raises(ValueError, match=r"x\.bin does not exist"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("change", "found"), [(-3, 397), (4, 404)])
def test_bin_of_wrong_length_gives_expected_and_found(make_data, change: int, found: int) -> None:
    prefix = make_data("x", [60, 40])
    with open(prefix + ".bin", "r+b") as file:
        file.truncate(400 + change)
    with pytest.raises(ValueError, match=rf"x\.bin has {found} bytes; its index says 400 bytes.*; copy"):
        IndexedDataset(prefix)


def test_an_index_ends_with_the_documents_or_a_mode_for_each(make_data) -> None:
    prefix = make_data("x", [60, 40])
    raw = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(raw + bytes(2))  # as Megatron-Core writes some
    assert len(IndexedDataset(prefix)) == 2
    Path(prefix + ".idx").write_bytes(raw + bytes(3))
    with pytest.raises(DamagedData, match="of another data set"):
        IndexedDataset(prefix)


def test_truncated_index(make_data) -> None:
    prefix = make_data("x", [60, 40])
    size = os.path.getsize(prefix + ".idx")
    for length in (size - 1, 40, 20):
        os.truncate(prefix + ".idx", length)
        with pytest.raises(
            ValueError, match=rf"x\.idx has {length} bytes; its index says \d+ bytes, so it is truncated"
        ):
            IndexedDataset(prefix)
    os.truncate(prefix + ".idx", 0)
    with pytest.raises(ValueError, match=r"x\.idx starts with b'' \(0 bytes\)"):
        IndexedDataset(prefix)


def test_wrong_magic_and_version(make_data) -> None:
    prefix = make_data("x", [60, 40])
    raw = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(b"TNTIDX\0\0\0" + raw[9:])
    with pytest.raises(ValueError, match=r"x\.idx starts with b'TNTIDX.*starts with b'MMIDIDX.*;"):
        IndexedDataset(prefix)
    Path(prefix + ".idx").write_bytes(raw[:9] + struct.pack("<Q", 2) + raw[17:])
    with pytest.raises(ValueError, match=r"version 2"):
        IndexedDataset(prefix)
    Path(prefix + ".idx").write_bytes(raw[:17] + b"\x06" + raw[18:])
    with pytest.raises(ValueError, match=r"dtype code 6; only version 1 with integer tokens"):
        IndexedDataset(prefix)


def test_damaged_meta(make_data) -> None:
    prefix = make_data("x", [3])
    assert read_meta(prefix) is None
    Path(prefix + ".meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.meta\.json cannot be read \(.*; delete it"):
        read_meta(prefix)


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [("vocab_size", "257"), ("vocab_size", 257.0), ("eod_id", [2]), ("largest_id", True), ("text_bytes", "5"),
     ("digests", "x"), ("tokenizer", [])],
)  # fmt: skip
def test_an_entry_of_a_wrong_type_is_named(make_data, entry: str, wrong: object) -> None:
    """Of a meta that somebody wrote by hand: tracebacks, or a vocabulary of 257.0 tokens."""
    prefix = make_data("x", [3])
    Path(prefix + ".meta.json").write_text(json.dumps({"vocab_size": 257, entry: wrong}))
    with pytest.raises(UserError, match=rf"x\.meta\.json holds no valid {entry}; it must be as .* wrote it; delete it"):
        read_meta(prefix)
    Path(prefix + ".meta.json").write_text(json.dumps({entry: None}))
    assert read_meta(prefix) == {entry: None}


def test_a_changed_meta_is_refused_and_one_without_a_checksum_accepted(make_data) -> None:
    prefix = make_data("x", [3], meta={"vocab_size": 257})
    path = Path(prefix + ".meta.json")
    path.write_text(path.read_text().replace("257", "253"))
    with pytest.raises(DamagedData, match=r"x\.meta\.json is not as it was written .*remove the entry \"sha256\""):
        read_meta(prefix)
    path.write_text('{"vocab_size": 253}')
    assert read_meta(prefix) == {"vocab_size": 253}
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x\.meta\.json cannot be read"):
        read_meta(prefix)


@pytest.mark.parametrize("pointers", [[0, 0, 0], [0, 28, 12], [4, 16, 32], [0, 12, 2**62]])
def test_pointers_are_the_running_sum_of_the_sizes(make_data, pointers: list[int]) -> None:
    prefix = make_data("x", [3, 4, 5])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[34 + 12 : 34 + 36] = np.array(pointers, np.int64).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData):
        IndexedDataset(prefix)


def test_a_size_moved_to_its_neighbour_is_named(make_data) -> None:
    prefix = make_data("x", [3, 4, 5])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[34:46] = np.array([3, 5, 4], np.int32).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData, match=r"x\.bin has 48 bytes; its index says 44|document 2 of 4 tokens at byte 28"):
        IndexedDataset(prefix)


def test_a_range_beyond_a_document_is_no_range(make_data) -> None:
    data = IndexedDataset(make_data("x", [3, 4, 5]))
    assert data.get(1, 1, 3).tolist() == [4, 5, 6] and data.get(1, 4).tolist() == []
    for offset, length in ((-1, 2), (0, 5), (2, -1), (5, None)):
        with pytest.raises(IndexError, match="of document 1, which has 4 tokens"):
            data.get(1, offset, length)


def test_documents_are_checked_chunk_by_chunk(make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 2)
    prefix = make_data("x", [3, 4, 5, 6, 7])
    assert len(IndexedDataset(prefix)) == 5
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[34 + 20 + 24 : 34 + 20 + 32] = np.int64(40).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData, match="document 3 of 6 tokens at byte 40"):
        IndexedDataset(prefix)


def test_a_negative_size_is_named_though_all_adds_up(make_data) -> None:
    prefix = make_data("x", [3, 4, 5])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[34:46] = np.array([8, -2, 6], np.int32).tobytes()
    raw[46:70] = np.array([0, 32, 24], np.int64).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData, match="document 1 of -2 tokens"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("documents", [[0, 1, 7, 3], [1, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 2]])
def test_a_document_list_out_of_order_is_refused(make_data, documents: list[int]) -> None:
    prefix = make_data("x", [3, 4, 5])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[-32:] = np.array(documents, np.int64).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData, match=r"document list of .*x\.idx is out of order"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("name", "cure"),
    [("data/notes", "did you mean {}/notes_text_document?"),
     ("data/note_text_document", "did you mean {}/notes_text_document?"),
     ("data/gpt2tok_c4_100_text_document", "run ./download.sh for the paper's data"),
     ("other/x", "run tools/preprocess_data.py")],
)  # fmt: skip
def test_a_missing_prefix_gets_the_likely_cure(
    make_data: Callable[..., str], tmp_path: Path, name: str, cure: str
) -> None:
    (tmp_path / "data").mkdir()
    make_data("data/notes_text_document", [3])
    with pytest.raises(UserError) as error:
        IndexedDataset(tmp_path / name)
    assert str(error.value).endswith(cure.format(tmp_path / "data"))


def test_a_part_is_cut_by_documents_as_megatron_core_cuts(make_data) -> None:
    """Its rule: documents round(begin * n) to round(end * n), in Python's rounding (halves to even)."""
    prefix = make_data("x", list(range(1, 12)))
    whole = IndexedDataset(prefix)
    edges = [0.0, 0.5, 0.95454545454545454, 1.0]
    bounds = [(0, 6), (6, 10), (10, 11)]
    assert [(round(a * 11), round(b * 11)) for a, b in pairwise(edges)] == bounds
    for begin, end, (first, last) in zip(edges, edges[1:], bounds):
        part = pickle.loads(pickle.dumps(IndexedDataset(f"{prefix}@{begin}:{end}")))
        assert (part.part, part.prefix, len(part)) == ((first, last), prefix, last - first)
        assert part.num_tokens == len(part.tokens) == int(whole.sizes[first:last].sum())
        for index in range(len(part)):
            np.testing.assert_array_equal(part[index], whole[first + index])
        np.testing.assert_array_equal(part.tokens, np.concatenate([part[i] for i in range(len(part))]))


@pytest.mark.parametrize("part", ["0.1:0.1", "0.5:0.2", "0:1.5", "0.0:1e-06"])
def test_a_part_without_documents_is_refused(make_data, part: str) -> None:
    with pytest.raises(UserError, match=r"means documents \d+ to \d+ of 2; a part runs between .*; write"):
        IndexedDataset(f"{make_data('x', [60, 40])}@{part}")
