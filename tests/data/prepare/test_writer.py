"""Writing of token files: round trip, Megatron's bytes, complete or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.conftest import GOLDEN
from megatron.data.indexed import IndexedDataset, read_meta
from megatron.data.prepare.writer import IndexedDatasetWriter, token_dtype
from megatron.errors import Failure, UserError


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


def test_a_writer_that_comes_late_does_not_empty_what_was_just_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had opened the file before the first one renamed it, and got the lock after: the data set was gone."""
    first = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    first.add_document([1, 2])
    lock = fcntl.flock

    def late(*arguments) -> None:
        first.close()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process is writing"):
        IndexedDatasetWriter(tmp_path / "x", np.uint16)
    np.testing.assert_array_equal(IndexedDataset(tmp_path / "x")[0], [1, 2])


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


def test_meta_records_digests_and_the_largest_id(make_data) -> None:
    prefix = make_data("x", [3, 4], meta={"tokens": 7})
    digests = {part: hashlib.sha256(Path(f"{prefix}.{part}").read_bytes()).hexdigest() for part in ("bin", "idx")}
    assert read_meta(prefix) == {"tokens": 7, "largest_id": 6, "digests": digests}


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
