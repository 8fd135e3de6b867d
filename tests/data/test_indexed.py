"""Token files: round trip, damage, atomic writing."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import DamagedData, IndexedDataset, IndexedDatasetWriter, read_meta, token_dtype
from megatron.errors import Failure

from .conftest import GOLDEN


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_round_trip(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 200, size) for size in (5, 1, 0, 300, 7)]
    with IndexedDatasetWriter(tmp_path / "new" / "x", dtype) as writer:
        writer.add_document(documents[0])
        writer.add_documents(np.concatenate(documents[1:3]), np.array([1, 0]))
        for document in documents[3:]:
            writer.add_document(document.tolist())
    data = IndexedDataset(tmp_path / "new" / "x.bin")
    assert len(data) == 5
    assert data.dtype == dtype
    assert data.num_tokens == 313
    assert data.sizes.tolist() == [5, 1, 0, 300, 7]
    assert data.doc_idx.tolist() == [0, 1, 2, 3, 4, 5]
    for index, document in enumerate(documents):
        np.testing.assert_array_equal(data[index], document)
    np.testing.assert_array_equal(data.get(3, 10, 20), documents[3][10:30])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data))[4], documents[4])
    with pytest.raises(IndexError):
        data.get(0, 3, 3)
    assert sorted(os.listdir(tmp_path / "new")) == ["x.bin", "x.idx"]


def test_bytes_are_those_of_megatron(tmp_path: Path) -> None:
    golden = IndexedDataset(GOLDEN / "rand_text_document")
    with IndexedDatasetWriter(tmp_path / "x", token_dtype(50257)) as writer:
        for index in range(len(golden)):
            writer.add_document(golden[index])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x{suffix}").read_bytes() == (GOLDEN / f"rand_text_document{suffix}").read_bytes()


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


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
            writer.add_document([1, 2, 3])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_an_older_data_set_stays_until_the_new_one_is_complete(make_data, tmp_path: Path) -> None:
    prefix = make_data("x", [3])
    old = IndexedDataset(prefix)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    writer.add_document([7, 8])
    np.testing.assert_array_equal(IndexedDataset(prefix)[0], [0, 1, 2])
    writer.close({"tokens": 2})
    np.testing.assert_array_equal(IndexedDataset(prefix)[0], [7, 8])
    np.testing.assert_array_equal(old[0], [0, 1, 2])  # a reader of the old one keeps its files
    assert (read_meta(prefix) or {})["tokens"] == 2
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx", "x.meta.json"]


def test_two_writers_of_one_data_set(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(ValueError, match=r"another process is writing .*x; one writer per data set;"):
            IndexedDatasetWriter(tmp_path / "x", np.uint16)
    assert len(IndexedDataset(tmp_path / "x")) == 1


def test_ids_that_do_not_fit(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        with pytest.raises(ValueError, match=r"token ids 5 to 65536; uint16 holds 0 to 65535; use int32"):
            writer.add_document([5, 65536])
        with pytest.raises(ValueError, match="must be equal"):
            writer.add_documents(np.arange(3), np.array([2]))
        writer.add_document([65535])


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
            full = open("/dev/full", "wb")  # noqa: SIM115 - every write to it fails as on a full disk
            writer._bin.close()
            writer._bin = full
            writer.add_document(np.zeros(100_000, np.uint16))

    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(Failure, match=r"x could not be written \(No space left .*free space"):
        write()
    assert os.listdir(tmp_path) == []


def test_damaged_meta(make_data) -> None:
    prefix = make_data("x", [3])
    assert read_meta(prefix) is None
    Path(prefix + ".meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.meta\.json is not JSON .*; delete it"):
        read_meta(prefix)


def test_meta_records_digests_and_the_largest_id(make_data) -> None:
    prefix = make_data("x", [3, 4], meta={"tokens": 7})
    digests = {part: hashlib.sha256(Path(f"{prefix}.{part}").read_bytes()).hexdigest() for part in ("bin", "idx")}
    assert read_meta(prefix) == {"tokens": 7, "largest_id": 6, "digests": digests}


def test_a_changed_meta_is_refused_and_one_without_a_checksum_accepted(make_data) -> None:
    prefix = make_data("x", [3], meta={"vocab_size": 257})
    path = Path(prefix + ".meta.json")
    path.write_text(path.read_text().replace("257", "253"))
    with pytest.raises(DamagedData, match=r"x\.meta\.json is not as it was written .*remove the entry \"sha256\""):
        read_meta(prefix)
    path.write_text('{"vocab_size": 253}')
    assert read_meta(prefix) == {"vocab_size": 253}
    path.write_text("[" * 100_000)
    with pytest.raises(DamagedData, match=r"x\.meta\.json is not JSON"):
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


def test_a_document_list_out_of_order_is_refused(make_data) -> None:
    prefix = make_data("x", [3, 4, 5])
    raw = bytearray(Path(prefix + ".idx").read_bytes())
    raw[-16:-8] = np.int64(7).tobytes()
    Path(prefix + ".idx").write_bytes(raw)
    with pytest.raises(DamagedData, match=r"document list of .*x\.idx is out of order"):
        IndexedDataset(prefix)


def test_a_second_writer_on_a_file_system_without_locks_is_noticed(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    writer.add_document([1, 2])
    with open(tmp_path / "x.bin.tmp", "ab") as other:
        other.write(b"12")
    with pytest.raises(Failure, match=r"x\.bin\.tmp has 6 bytes instead of 4; one writer per data set"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_dtype_rule() -> None:
    assert token_dtype(50257) == np.uint16
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
