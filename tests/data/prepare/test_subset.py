"""Subsets and inspection of data sets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.blend import parse_blend, read_data_path_file
from megatron.data.identity import verify_data
from megatron.data.indexed import DamagedData, IndexedDataset, read_meta
from megatron.data.prepare.inspection import histogram, inspect, record
from megatron.data.prepare.subset import Selection, subset_indexed, subset_jsonl
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = str(ROOT / "tests/golden/data/golden_text_document")


def documents(prefix: str) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data[i].tolist() for i in range(len(data))]


def write(prefix: Path, contents: list[list[int]], meta: dict | None = None) -> str:
    writer = IndexedDatasetWriter(str(prefix), np.uint16)
    for content in contents:
        writer.add_document(content)
    writer.close(meta)
    return str(prefix)


def byte_data(folder: Path, texts: list[str]) -> str:
    contents = [[*text.encode(), 256] for text in texts]
    meta = {
        "format": 1,
        "documents": len(texts),
        "tokens": sum(map(len, contents)),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "append_eod": True,
        "vocab_size": 257,
        "eod_id": 256,
        "tokenizer": {"type": "ByteTokenizer"},
    }
    return write(folder / "bytes", contents, meta)


def test_first_documents(tmp_path: Path) -> None:
    report = subset_indexed(GOLDEN, str(tmp_path / "a"), Selection(documents=7))
    assert documents(str(tmp_path / "a")) == documents(GOLDEN)[:7]
    assert report["tokens"] == sum(map(len, documents(GOLDEN)[:7])) == IndexedDataset(str(tmp_path / "a")).num_tokens
    assert report["documents"] == 7


def test_documents_up_to_tokens_is_the_longest_prefix_that_fits(tmp_path: Path) -> None:
    sizes = IndexedDataset(GOLDEN).sizes
    exact = int(sizes[:9].sum())
    for limit, expected in ((exact, 9), (exact - 1, 8), (exact + 1, 9)):
        out = str(tmp_path / str(limit))
        assert subset_indexed(GOLDEN, out, Selection(tokens=limit))["documents"] == expected
        assert documents(out) == documents(GOLDEN)[:expected]


def test_random_samples_are_seeded_nested_and_in_order(tmp_path: Path) -> None:
    sizes = IndexedDataset(GOLDEN).sizes
    small, large = (set(Selection(documents=k, seed=5).choose(sizes).tolist()) for k in (8, 20))
    assert small < large
    assert large != set(range(20))
    assert set(Selection(documents=8, seed=6).choose(sizes).tolist()) != small
    subset_indexed(GOLDEN, str(tmp_path / "r"), Selection(documents=8, seed=5))
    everything = documents(GOLDEN)
    assert documents(str(tmp_path / "r")) == [everything[i] for i in sorted(small)]
    by_tokens = Selection(tokens=1000, seed=5).choose(sizes)
    assert sizes[by_tokens].sum() <= 1000


def test_text_bytes_of_a_subset_are_exact(tmp_path: Path) -> None:
    source = byte_data(tmp_path, ["one", "größer", "three"])
    report = subset_indexed(source, str(tmp_path / "out" / "s"), Selection(documents=2))
    assert report["text_bytes"] == len("one") + len("größer".encode())
    meta = json.loads((tmp_path / "out" / "s.meta.json").read_text())
    assert (meta["documents"], meta["tokens"], meta["vocab_size"]) == (2, 3 + 8 + 2, 257)
    assert inspect(str(tmp_path / "out" / "s"))["problems"] == []


def test_text_bytes_with_gpt2_files_and_moved_paths(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    vocab = {"a": 0, "Ġthe": 1, "<|endoftext|>": 2}
    (tmp_path / "tok" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tok" / "merges.txt").write_text("")
    spec = {"type": "GPT2BPETokenizer", "vocab_file": "tok/vocab.json", "merge_file": "tok/merges.txt"}
    source = write(tmp_path / "d", [[0, 1, 2], [1, 2]], {"format": 1, "text_bytes": 9, "tokenizer": spec})
    report = subset_indexed(source, str(tmp_path / "sub" / "e"), Selection(documents=1))
    assert report["text_bytes"] == 5
    meta = json.loads((tmp_path / "sub" / "e.meta.json").read_text())
    assert meta["tokenizer"]["vocab_file"] == "../tok/vocab.json"


def test_without_a_byte_level_tokenizer_text_bytes_are_absent(tmp_path: Path) -> None:
    source = write(tmp_path / "d", [[1, 2], [3]], {"format": 1, "text_bytes": 99, "tokens": 3, "documents": 2})
    subset_indexed(source, str(tmp_path / "e"), Selection(documents=1))
    assert "text_bytes" not in json.loads((tmp_path / "e.meta.json").read_text())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(), "one size"),
        (Selection(documents=1, tokens=1), "one size"),
        (Selection(documents=41), "data set with 40"),
        (Selection(documents=0), "data set with 40"),
        (Selection(tokens=6767), "6,766 tokens"),
        (Selection(tokens=1), "at least one document must fit"),
    ],
)
def test_impossible_selections_write_nothing(tmp_path: Path, selection: Selection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subset_indexed(GOLDEN, str(tmp_path / "x"), selection)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    subset_indexed(GOLDEN, out, Selection(documents=3))
    with pytest.raises(ValueError, match=r"exists"):
        subset_indexed(GOLDEN, out, Selection(documents=4))
    assert len(documents(out)) == 3


def test_jsonl_lines_are_copied_byte_for_byte(tmp_path: Path) -> None:
    lines = ['{"text": "a b"}', '{"text":"größer", "id": 1}', "", '{"text": "c"}']
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")  # no newline at the end
    report = subset_jsonl(str(source), str(tmp_path / "out.jsonl"), Selection(documents=3), tokenizer=ByteTokenizer())
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "\n".join([lines[0], lines[1], lines[3]]) + "\n"
    assert report["tokens"] == 3 + 8 + 1 + 3
    by_tokens = subset_jsonl(str(source), str(tmp_path / "t.jsonl"), Selection(tokens=13), tokenizer=ByteTokenizer())
    assert (by_tokens["documents"], by_tokens["tokens"]) == (2, 13)
    assert by_tokens["data_path_line"] == f'"1.0 {tmp_path}/t_text_document"'
    assert subset_jsonl(str(source), str(tmp_path / "n.jsonl"), Selection(documents=1))["tokens"] is None
    with pytest.raises(ValueError, match=r"counting needs a tokenizer"):
        subset_jsonl(str(source), str(tmp_path / "u.jsonl"), Selection(tokens=5))


def test_jsonl_without_the_field_names_the_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2"):
        subset_jsonl(str(source), str(tmp_path / "o.jsonl"), Selection(tokens=2), tokenizer=ByteTokenizer())
    assert not (tmp_path / "o.jsonl").exists()


def test_command_writes_the_data_path_file(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools/make_subset.py"),
        "--input",
        GOLDEN,
        "--output",
        str(tmp_path / "s"),
        "--documents",
        "5",
    ]
    result = subprocess.run(
        [*command, "--data-path-file", str(tmp_path / "p.txt")], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    ((weight, prefix),) = parse_blend(read_data_path_file(tmp_path / "p.txt"))
    assert (weight, prefix) == (1.0, str(tmp_path / "s"))
    assert json.loads(result.stdout)["tokens"] == IndexedDataset(prefix).num_tokens


def test_inspection_of_golden_data() -> None:
    report = inspect(GOLDEN, vocab_size=50257, eod_id=50256)
    assert (report["tokens_per_epoch"], report["documents"], report["problems"]) == (6766, 40, [])
    assert report["documents_ending_in_eod"] == 40
    assert sum(row[2] for row in report["histogram"]) == 40
    assert sum(row[3] for row in report["histogram"]) == 6766


def test_histogram_bounds() -> None:
    rows = histogram(np.array([0, 1, 2, 3, 4, 7, 8], np.int64))
    assert rows == [[0, 0, 1, 0], [1, 1, 1, 1], [2, 3, 2, 5], [4, 7, 2, 11], [8, 15, 1, 8]]


def test_duplicates_are_counted_after_their_first(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [[1, 2], [3], [1, 2], [1, 2], [2, 1]])
    report = inspect(prefix)
    assert (report["duplicate_documents"], report["duplicate_tokens"]) == (2, 4)
    assert inspect(prefix, duplicates=False)["duplicate_documents"] is None


def test_damage_is_found(tmp_path: Path) -> None:
    meta = {"format": 1, "documents": 3, "tokens": 4, "append_eod": True, "eod_id": 7, "vocab_size": 9}
    prefix = write(tmp_path / "d", [[1, 2, 9], [3, 9], [4, 9]], meta)
    problems = " ".join(inspect(prefix)["problems"])
    for part in ("metadata says 4 tokens", "largest id is 9", "3 documents do not end in 7"):
        assert part in problems
    index = bytearray((tmp_path / "d.idx").read_bytes())
    index[34 + 4 * 3 + 8] = 2  # second pointer
    (tmp_path / "d.idx").write_bytes(bytes(index))
    with pytest.raises(DamagedData, match=r"d\.idx puts document 1 of 2 tokens at byte 2"):
        inspect(prefix)


def test_data_without_digests_can_be_recorded_and_verified(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [[1, 2, 7], [3, 7]])
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "--record", prefix]
    subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    verify_data([prefix])
    meta = read_meta(prefix) or {}
    assert (meta["documents"], meta["tokens"], meta["largest_id"]) == (2, 5, 7)
    (tmp_path / "d.bin").write_bytes(bytes(10))
    with pytest.raises(DamagedData):
        verify_data([prefix])
    with pytest.raises(UserError, match="only intact data are recorded"):
        record(inspect(prefix))


def test_changed_tokens_are_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [[1, 2, 7], [3, 7]], {"vocab_size": 9})
    raw = bytearray((tmp_path / "d.bin").read_bytes())
    raw[0] ^= 2
    (tmp_path / "d.bin").write_bytes(raw)
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), prefix]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "DAMAGED: " in result.stdout and "d.bin is not as it was written (its checksum differs)" in result.stdout
