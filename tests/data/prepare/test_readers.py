"""Input files are read as the standards say; nothing is skipped silently; errors name file and line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.data.blend import read_data_path_file
from megatron.data.prepare.preprocess import PreprocessOptions, preprocess
from megatron.data.prepare.readers import Source, find_sources, read_batches
from megatron.data.prepare.rows import parse_row
from megatron.data.prepare.streams import read_json_lines, read_lines
from megatron.data.prepare.subset import Selection, subset_jsonl
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError

TEXTS = ["one\u2028two", "next\u0085line", "carriage\rreturn", "größer 第"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zstandard(raw: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def texts(path: Path) -> list[str]:
    rows = [row for batch in read_batches(Source(path, "jsonl"), ["text"]) for row in batch.rows]
    return [text for row in rows for text in parse_row(row, "line", ["text"]) or []]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_every_compression_with_and_without_a_byte_order_mark(tmp_path: Path, suffix: str, mark: bytes) -> None:
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](mark + LINES))
    assert find_sources([str(tmp_path)]) == [Source(path, "jsonl")]
    assert texts(path) == TEXTS
    report = subset_jsonl(str(path), str(tmp_path / "out.jsonl"), Selection(documents=3), tokenizer=ByteTokenizer())
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(line + b"\n" for line in LINES.split(b"\n")[:3])
    assert report["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS[:3])


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_compressed_parts_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](LINES) + COMPRESSORS[suffix](LINES))
    assert texts(path) == TEXTS + TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(
    "damage", ["cut off", "changed", "not compressed", "cut in the first bytes", "last byte", "empty"]
)
def test_damaged_compression_names_the_file(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"in.jsonl{suffix}"
    noise = "".join(f'{{"text": "{i * 7919 % 10007} {i * i}"}}\n' for i in range(20000)).encode()
    raw = bytearray(COMPRESSORS[suffix](noise))
    half = len(raw) // 2
    if damage == "changed":
        place = (
            2 if suffix == ".zst" else half
        )  # frames that pyarrow writes have no checksum, so their header is changed
        raw[place : place + 40] = bytes(40)
    contents = {"cut off": raw[:half], "not compressed": noise, "cut in the first bytes": raw[:7], "changed": raw,
                "last byte": raw[:-1], "empty": b""}  # fmt: skip
    path.write_bytes(contents[damage])
    with pytest.raises(UserError, match=rf"in\.jsonl{suffix} is damaged or cut off.*; .*copy or compress it again"):
        list(read_lines(path))
    if (suffix, damage) == (".gz", "cut off"):
        with pytest.raises(UserError, match=r"cut off after line \d+ "):
            list(read_lines(path))


def test_damaged_parquet_names_the_file(tmp_path: Path) -> None:
    """Whatever byte of it is changed, and wherever it is cut: the rows, or one line for the user."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    rows = [f"text {i * 7919 % 10007} größer" for i in range(300)]
    parquet.write_table(pyarrow.table({"text": rows}), path)
    raw, refused = path.read_bytes(), 0
    step = max(1, len(raw) // 120)
    damaged = [raw[:cut] for cut in range(0, len(raw), step)]
    damaged += [raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :] for at in range(0, len(raw), step)]
    for content in [*damaged, b"PAR1" + bytes(20) + b"PAR1"]:
        path.write_bytes(content)
        try:
            list(read_batches(Source(path, "parquet"), ["text"]))
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > 120


@pytest.mark.parametrize(
    ("name", "content"), [("*.arrow", b""), ("*.arrow", b"cut"), ("*.arrow", None), ("state.json", b"{"), ("state.json", b"{}")]
)  # fmt: skip
def test_a_damaged_datasets_folder_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    [source] = find_sources([str(tmp_path / "saved")])
    assert sum(len(batch.rows) for batch in read_batches(source, ["text"])) == 2
    [file] = (tmp_path / "saved").glob(name)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"saved .*; it must be a sound folder of datasets; copy or save it again"):
        list(read_batches(source, ["text"]))


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path) -> None:
    for name in (
        "a.jsonl",
        "b.json.zst",
        "README.xyz",
        "notes.docx",
        "sub/c.txt.bz2",
        "sub/.state.txt",
        ".git/config.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    said: list[str] = []
    found = find_sources([str(tmp_path)], say=said.append)
    assert [str(source.path.relative_to(tmp_path)) for source in found] == ["a.jsonl", "b.json.zst", "sub/c.txt.bz2"]
    assert "not looked at: 2 hidden files or folders" in said[0]
    assert "left out 2 of its files" in said[1] and "README.xyz" in said[1] and "notes.docx" in said[1]
    assert "pandoc IN.docx" in said[2] and len(said) == 3
    with pytest.raises(UserError, match=r"notes\.docx: its name does not tell the format; .*convert it first: pandoc"):
        find_sources([str(tmp_path / "notes.docx")])


def test_a_pattern_means_files_and_names_the_folders_that_it_matches(tmp_path: Path) -> None:
    """A folder among them was said to have a name that does not tell the format."""
    for name in ("a.txt", "sub/b.txt", "other/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    said: list[str] = []
    found = find_sources(["*"], root=str(tmp_path), say=said.append)
    assert [source.path.name for source in found] == ["a.txt"]
    assert len(said) == 1 and "not looked at: the folders" in said[0] and said[0].count(str(tmp_path)) == 2
    found = find_sources(["**"], root=str(tmp_path), say=said.append)
    assert sorted(source.path.name for source in found) == ["a.txt", "b.txt", "c.txt"] and len(said) == 1
    assert len(find_sources(["*/*"], "jsonl", root=str(tmp_path), say=said.append)) == 2


def test_links_are_followed_once_and_broken_ones_named(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "else/where").mkdir(parents=True)
    for name in ("in/a.txt", "in/sub/b c.md", "else/where/ü.html", "else/d.rst", "else/e.py"):
        (tmp_path / name).write_text("text")
    (tmp_path / "in/sub/up").symlink_to("..")
    (tmp_path / "in/linked").symlink_to("../else")
    (tmp_path / "in/self.txt").symlink_to("self.txt")
    (tmp_path / "in/gone.txt").symlink_to("nowhere")
    said: list[str] = []
    found = find_sources([str(tmp_path / "in")], say=said.append)
    names = [str(source.path.relative_to(tmp_path / "in")) for source in found]
    assert names == ["a.txt", "linked/d.rst", "linked/e.py", "linked/where/ü.html", "sub/b c.md"]
    assert [source.format for source in found] == ["text", "text", "text", "html", "text"]
    assert len(said) == 1 and "no files or broken links: gone.txt, self.txt" in said[0]


def test_a_folder_that_says_it_holds_splits_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/state.json").write_text("{}")
    for content in ('{"splits": []}', "[", '{"splits": 5}', '{"splits": ["gone"]}'):
        (tmp_path / "dataset_dict.json").write_text(content)
        with pytest.raises(UserError, match="holds the splits test; one data set is made of one split"):
            find_sources([str(tmp_path)])


def test_no_input_at_all_is_not_the_working_folder() -> None:
    """What an unset variable of a script gives."""
    for text in ("", " "):
        with pytest.raises(UserError, match="must name a file, a folder or a pattern"):
            find_sources([text])


@pytest.mark.parametrize(
    ("content", "kind"),
    [('[{"text": "a"}, {"text": "b"}]', "array"), ('[\n {"text": "a"}\n]', "array"), ('\n[ {\n"text": "a"}]', "array"),
     ('{\n "text": "a"\n}', "object spread over lines")],
)  # fmt: skip
def test_one_json_value_instead_of_lines_is_one_message(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"in\.json holds one JSON {kind}; JSON lines .* jq -c"):
        list(read_json_lines(path))
    with pytest.raises(UserError, match="holds one JSON"):
        preprocess([Source(path, "jsonl")], ByteTokenizer(), PreprocessOptions(str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_deep_nesting_is_a_malformed_row_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: nested too deeply to be read"):
        preprocess([Source(path, "jsonl")], ByteTokenizer(), PreprocessOptions(str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"in\.jsonl, line 2: nested too deeply"):
        subset_jsonl(str(path), str(tmp_path / "o.jsonl"), Selection(tokens=1), tokenizer=ByteTokenizer())


def test_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in 'quotes'.txt"
    path.write_text("text", encoding="utf-16")
    with pytest.raises(UserError, match=r"in 'quotes'\.txt is UTF-16; text must be UTF-8; convert it") as caught:
        list(read_batches(Source(path, "text"), ["text"]))
    assert str(path) in shlex.split(caught.value.fix), "the command runs as printed"


def test_a_data_path_file_with_a_byte_order_mark_and_odd_characters(tmp_path: Path) -> None:
    (tmp_path / "path.txt").write_bytes(codecs.BOM_UTF8 + '"1.0 data/odd\u2028name"\r\n'.encode())
    assert read_data_path_file(tmp_path / "path.txt") == ["1.0 data/odd\u2028name"]


def test_a_subset_is_not_written_under_a_compressed_name(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="written as plain JSON lines"):
        subset_jsonl(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl.gz"), Selection(documents=1))
