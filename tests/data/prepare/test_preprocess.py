"""tools/preprocess_data.py from the outside: every input, malformed rows, interruption."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.conftest import GOLDEN, ROOT
from megatron.data.identity import tokenizer_fingerprint
from megatron.data.indexed import IndexedDataset, read_meta
from megatron.data.prepare.preprocess import _result
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError
from megatron.files import sha256_of

BYTES = ("--tokenizer-type", "ByteTokenizer")
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "9")
TEXTS = [f"document {i}: " + "naïve 🙂 text\n" * (i % 7) for i in range(5000)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def decoded(prefix: Path | str) -> list[str]:
    data = IndexedDataset(prefix)
    return [ByteTokenizer().decode(data[index].tolist()) for index in range(len(data))]


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


@pytest.mark.parametrize("workers", [1, 3])
def test_jsonl(tool, tmp_path: Path, workers: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    done = tool(
        "preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out", *BYTES, "--append-eod",
        "--workers", workers, "--dataset-impl", "mmap",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5,000 documents" in done.stdout
    assert "documents/s" in done.stdout
    assert "tokens/s" in done.stdout
    prefix = tmp_path / "out_text_document"
    assert decoded(prefix) == TEXTS
    data = IndexedDataset(prefix)
    assert all(data[index][-1] == 256 for index in range(len(data)))
    size = sum(len(text.encode()) for text in TEXTS)
    assert read_meta(prefix) == {
        "format": 1, "documents": 5000, "tokens": size + 5000, "text_bytes": size, "append_eod": True,
        "vocab_size": 257, "eod_id": 256, "malformed": 0, "empty": 0, "tokenizer": {"type": "ByteTokenizer"}, "largest_id": 256,
        "tokenizer_fingerprint": tokenizer_fingerprint(ByteTokenizer()),
        "digests": {part: sha256_of(f"{prefix}.{part}") for part in ("bin", "idx")},
    }  # fmt: skip
    assert outputs(tmp_path) == [f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".meta.json")]


def test_golden_data_from_its_text(tool, tmp_path: Path, gpt2_files: tuple[str, str]) -> None:
    """The reference implementation's files, byte for byte, from the command of its users."""
    done = tool(
        "preprocess_data.py", "--input", GOLDEN / "golden.jsonl", "--output-prefix", tmp_path / "golden",
        "--vocab-file", gpt2_files[0], "--merge-file", gpt2_files[1], "--dataset-impl", "mmap",
        "--tokenizer-type", "GPT2BPETokenizer", "--append-eod", "--workers", "2", "--json-keys", "text",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        name = f"golden_text_document{suffix}"
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_several_keys_inputs_and_gzip(tool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"title": f"t{i}", "body": f"body {i}" if i % 2 else ""} for i in range(10)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "in" / "b.jsonl").write_text("".join(lines[5:]) + "\n\n")
    with gzip.open(tmp_path / "in" / "a.json.gz", "wt") as file:
        file.write("".join(lines[:5]))
    done = tool(
        "preprocess_data.py", "--input", tmp_path / "in", "--output-prefix", tmp_path / "out", "--json-keys",
        "title", "body", "--workers", 1, *BYTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out_title_document") == [row["title"] for row in rows]
    assert decoded(tmp_path / "out_body_document") == [row["body"] for row in rows if row["body"]]
    assert "5 empty documents were left out" in done.stdout
    meta = read_meta(tmp_path / "out_body_document")
    assert meta is not None
    assert (meta["documents"], meta["empty"]) == (5, 5)


def test_plain_text(tool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.txt").write_text("one\ntwo\n\n \nthree\n")
    (tmp_path / "in" / "2.txt").write_text("four")
    for split, expected in (
        ("file", ["one\ntwo\n\n \nthree\n", "four"]),
        ("blank-line", ["one\ntwo\n", "three\n", "four"]),
    ):
        done = tool(
            "preprocess_data.py", "--input", tmp_path / "in" / "*.txt", "--output-prefix", tmp_path / split,
            "--text-split", split, "--workers", 1, *BYTES,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert decoded(tmp_path / f"{split}_text_document") == expected


def test_parquet_and_saved_datasets(tool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"id": list(range(1500)), "text": TEXTS[:1500]})
    data.to_parquet(str(tmp_path / "in.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("in.parquet", "saved"):
        done = tool(
            "preprocess_data.py",
            "--input",
            tmp_path / name,
            "--output-prefix",
            tmp_path / f"out-{name}",
            "--workers",
            1,
            *BYTES,
        )
        assert done.returncode == 0, done.stderr
        assert decoded(tmp_path / f"out-{name}_text_document") == TEXTS[:1500]
    done = tool(
        "preprocess_data.py",
        "--input",
        tmp_path / "in.parquet",
        "--output-prefix",
        tmp_path / "no",
        "--json-keys",
        "body",
        *BYTES,
    )
    assert done.returncode == 2
    assert "has the columns id, text, not body; --json-keys names columns" in done.stderr
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "dict"))
    done = tool("preprocess_data.py", "--input", tmp_path / "dict", "--output-prefix", tmp_path / "no", *BYTES)
    assert done.returncode == 2
    assert "holds the splits train, test; one data set is made of one split;" in done.stderr
    assert not list(tmp_path.glob("no*"))


BAD_LINES = {
    3: b"{not json}",
    5: b'{"body": "no text"}',
    8: b'{"text": 7}',
    9: b'["a list"]',
    12: b'{"text": "\xff\xfe"}',
    2500: b'{"text": "lone \\ud800 surrogate"}',
}


@pytest.fixture
def malformed(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS[:3000]]
    for number, line in BAD_LINES.items():
        lines[number - 1] = line
    lines.insert(20, b"")  # a blank line is no error, but it counts as a line
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "in.jsonl"


def test_malformed_lines_stop_the_run_by_default(tool, tmp_path: Path, malformed: Path) -> None:
    done = tool("preprocess_data.py", "--input", malformed, "--output-prefix", tmp_path / "out", *BYTES, "--workers", 2)
    assert done.returncode == 2
    assert "6 malformed rows" in done.stderr
    for number in BAD_LINES:
        assert f"in.jsonl, line {number + (number > 20)}: " in done.stderr
    assert "nothing was written; correct them, or leave them out with --max-errors N" in done.stderr
    assert outputs(tmp_path) == []


def test_malformed_lines_can_be_left_out(tool, tmp_path: Path, malformed: Path) -> None:
    command = ("preprocess_data.py", "--input", malformed, "--output-prefix", tmp_path / "out", *BYTES, "--workers", 1)
    assert tool(*command, "--max-errors", 5).returncode == 2
    assert outputs(tmp_path) == []
    for flags in (("--max-errors", "6"), ("--skip-errors", "--overwrite")):
        done = tool(*command, *flags)
        assert done.returncode == 0, done.stderr
        assert "left out 6 malformed rows" in done.stderr
        assert "in.jsonl, line 2501: " in done.stderr
        expected = [text for number, text in enumerate(TEXTS[:3000], 1) if number not in BAD_LINES]
        assert decoded(tmp_path / "out_text_document") == expected
        meta = read_meta(tmp_path / "out_text_document")
        assert meta is not None
        assert meta["malformed"] == 6


def test_finished_data_is_not_replaced_by_accident(tool, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:10])
    command = ("preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out", *BYTES, "--workers", 1)
    assert tool(*command).returncode == 0
    before = (tmp_path / "out_text_document.idx").stat().st_mtime_ns
    done = tool(*command)
    assert done.returncode == 2
    assert "out_text_document.idx exists;" in done.stderr
    assert (tmp_path / "out_text_document.idx").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl", *BYTES], "--input absent.jsonl: nothing to read there"),
        (["--input", str(ROOT / "pyproject.toml"), *BYTES], "its name does not tell the format; known are .jsonl"),
        (["--input", str(GOLDEN / "golden.jsonl")], "no tokenizer: neither a flag nor the data"),
        (["--input", str(GOLDEN / "golden.jsonl"), *BYTES, "--json-keys", "body"], "40 malformed rows"),
        (["--input", str(GOLDEN / "golden.jsonl"), *BYTES, "--json-keys", "body"], "; --json-keys chooses)"),
        (["--input", str(GOLDEN / "golden.jsonl"), *NULL, "--append-eod"],
         "--append-eod with NullTokenizer(9), which has no end-of-document token"),
        (["--input", str(GOLDEN / "golden.jsonl"), *NULL],
         "is no token id; NullTokenizer reads ids 0 to 8"),
    ],
)  # fmt: skip
def test_wrong_use(tool, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = tool("preprocess_data.py", *arguments, "--output-prefix", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    ["--max-errors=-1", "--workers=0", "--workers=99999999", "--log-interval=-3", "--vocab-size=0", "--workers=nan",
     "--vocab-size=1" + "0" * 5000],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(tmp_path: Path, number: str) -> None:
    from megatron.commands import preprocess

    with pytest.raises(UserError, match="it must be a whole number from"):
        preprocess.parse_args(["--input", "x", "--output-prefix", str(tmp_path / "out"), number])


def test_relative_inputs_lie_in_the_root(tool, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "in.jsonl", TEXTS[:3])
    second = write_jsonl(tmp_path / "second.jsonl", TEXTS[3:5])
    done = tool(
        "preprocess_data.py", "--root", tmp_path / "raw", "--input", "in.jsonl", second, "--output-prefix",
        tmp_path / "out", *BYTES, "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out_text_document") == TEXTS[:5]


def test_empty_input(tool, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    done = tool("preprocess_data.py", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", *BYTES)
    assert done.returncode == 2
    assert "the input holds no text" in done.stderr
    assert outputs(tmp_path) == []


def test_kill_9_leaves_no_data_set_and_no_process(tool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.jsonl")  # the input never ends, so the kill is always in the middle
    arguments = ["--input-format", "jsonl", "--output-prefix", str(tmp_path / "out"), "--workers", "2", *BYTES]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments]
    process = subprocess.Popen([*command, "--input", str(tmp_path / "in.jsonl")], start_new_session=True)
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    with open(tmp_path / "in.jsonl", "wb") as pipe:
        try:
            deadline = time.monotonic() + 60
            while not ((half := tmp_path / "out_text_document.bin.tmp").exists() and half.stat().st_size > 0):
                assert time.monotonic() < deadline
                pipe.write(lines)
        finally:
            process.kill()
            process.wait()
    assert outputs(tmp_path) == ["out_text_document.bin.tmp"]
    with pytest.raises(ValueError, match=r"out_text_document\.idx does not exist"):
        IndexedDataset(tmp_path / "out_text_document")
    deadline = time.monotonic() + 30
    while _group_lives(process.pid):  # the workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.1)
    source = write_jsonl(tmp_path / "again.jsonl", TEXTS[:100])
    done = tool("preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out", *BYTES, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out_text_document") == TEXTS[:100]
    assert outputs(tmp_path) == [f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".meta.json")]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.jsonl")
    arguments = ["--input-format", "jsonl", "--output-prefix", str(tmp_path / "out"), "--workers", "2", *BYTES]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments]
    process = subprocess.Popen([*command, "--input", str(tmp_path / "in.jsonl")], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.wait()
        pytest.skip("needs /proc/PID/task/PID/children")
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    with open(tmp_path / "in.jsonl", "wb") as pipe:
        try:
            deadline = time.monotonic() + 60
            while not ((half := tmp_path / "out_text_document.bin.tmp").exists() and half.stat().st_size > 0):
                assert time.monotonic() < deadline
                pipe.write(lines)
            workers = [
                pid for pid in children.read_text().split() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
            ]
            os.kill(int(workers[-1]), signal.SIGKILL)
            pipe.write(lines)
        except BrokenPipeError:
            pass
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "one of 2 workers was killed, probably for lack of memory; nothing was written" in error
    assert outputs(tmp_path) == []


def test_dtype_follows_the_vocabulary(tool, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "5 70000 1"}\n')
    done = tool(
        "preprocess_data.py", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type",
        "NullTokenizer", "--vocab-size", 80_000, "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = IndexedDataset(tmp_path / "out_text_document")
    assert data.dtype == np.int32
    assert data[0].tolist() == [5, 70000, 1]


def test_a_worker_that_died_while_it_sent_a_result_is_noticed() -> None:
    """The pool waits for the rest of such a result for ever."""
    dead = SimpleNamespace(exitcode=-9)
    pool = SimpleNamespace(_processes={1: SimpleNamespace(exitcode=None), 2: dead})
    with pytest.raises(BrokenProcessPool):
        _result(pool, Future())  # type: ignore[arg-type]


def test_of_several_keys_all_data_sets_appear_or_none(tool, tmp_path: Path) -> None:
    """The first one stayed when the second could not be written."""
    (tmp_path / "in.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "out_b_document.idx.tmp").mkdir()
    command = ("preprocess_data.py", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", *BYTES)
    done = tool(*command, "--json-keys", "a", "b", "--workers", 1)
    assert done.returncode == 1 and "could not be written" in done.stderr, done.stderr
    assert outputs(tmp_path) == ["out_b_document.idx.tmp"]
