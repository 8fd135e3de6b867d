"""tools/split_data.py: two sides of own text, without leakage, whatever lies in the folder."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.data.prepare.documents import ReadOptions
from megatron.data.prepare.readers import Source, find_sources
from megatron.data.prepare.split import MIN_TEXT_BYTES, SplitOptions, split
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError

Sides = tuple[list[dict[str, str]], list[dict[str, str]]]


def prose(seed: int, count: int = 120) -> str:
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(10**5)}" + ".\n\n" * (not source.randrange(8)) for _ in range(count))


def rows(folder: Path, side: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Source:
    path.write_text("".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return Source(path, "jsonl")


@pytest.fixture
def halve(tmp_path: Path) -> Callable[..., Sides]:
    """Return a function that splits texts and returns (train, validation)."""

    def run(texts: list[str], name: str = "out", **options: Any) -> Sides:
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        split([source], tmp_path / name, SplitOptions(**options), say=lambda line: None)
        return rows(tmp_path / name, "train"), rows(tmp_path / name, "validation")

    return run


def test_every_document_is_on_one_side_and_the_sides_have_their_sizes(halve: Callable[..., Sides]) -> None:
    texts = [prose(seed) for seed in range(300)]
    train, validation = halve(texts, fraction=0.1)
    assert sorted(row["text"] for row in train + validation) == sorted(texts)
    size = sum(len(row["text"]) for row in validation)
    assert 0.09 <= size / sum(map(len, texts)) <= 0.111
    assert validation[0]["source"].startswith("out.jsonl:")
    train, validation = halve(texts, "counted", documents=7)
    assert (len(train), len(validation)) == (293, 7)
    size = len(texts[0]) * 3
    train, validation = halve(texts, "both", documents=100, max_validation_bytes=size)
    assert len(validation) < 7 and size * 0.5 < sum(len(row["text"]) for row in validation) <= size * 1.1
    train, validation = halve(texts, "capped", fraction=0.5, max_validation_bytes=5000)
    assert 4000 <= sum(len(row["text"]) for row in validation) <= 5500


def test_the_choice_depends_on_texts_and_seed_alone(halve: Callable[..., Sides]) -> None:
    texts = [prose(seed) for seed in range(60)]
    chosen = {row["text"] for row in halve(texts)[1]}
    assert {row["text"] for row in halve(texts[::-1], "reversed")[1]} == chosen
    assert {row["text"] for row in halve(texts, "seeded", seed=7)[1]} != chosen


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_on_one_side_and_copies_are_left_out(halve: Callable[..., Sides], seed: int) -> None:
    pairs = [(prose(number), prose(number) + " and an addition") for number in range(40)]
    train, validation = halve([text for pair in pairs for text in pair] + [pairs[0][0]] * 5, seed=seed, fraction=0.2)
    train_texts, validation_texts = ({row["text"] for row in side} for side in (train, validation))
    assert len(train) + len(validation) == 80
    assert len(validation) >= 14, "pairs go to validation together, not to training for want of the partner"
    for one, other in pairs:
        assert (one in validation_texts) == (other in validation_texts) == (one not in train_texts)


def test_a_document_that_training_holds_in_pieces_is_no_validation_document(halve: Callable[..., Sides]) -> None:
    """No training document is a near-duplicate of the collection, but all together are."""
    parts = [prose(seed, 100) for seed in range(30)]
    collection = "\n".join(part[: len(part) // 3] for part in parts)
    for seed in range(6):
        train, validation = halve([*parts, collection], f"s{seed}", seed=seed, fraction=0.3)
        assert collection in {row["text"] for row in train}
        assert validation


def test_the_same_text_is_kept_and_changed_text_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [prose(seed) for seed in range(50)])
    said: list[str] = []
    first = split([source], tmp_path / "out", SplitOptions(), say=said.append)
    before = (tmp_path / "out/train.jsonl").stat().st_mtime_ns
    assert split([source], tmp_path / "out", SplitOptions(), say=said.append) == first
    assert "split before" in said[-1] and (tmp_path / "out/train.jsonl").stat().st_mtime_ns == before
    os.utime(tmp_path / "in.jsonl")  # as a copy or a fresh clone has it
    assert split([source], tmp_path / "out", SplitOptions(), say=said.append) == first
    (tmp_path / "moved").mkdir()
    moved = write_jsonl(tmp_path / "moved/in.jsonl", [prose(seed) for seed in range(50)])
    assert split([moved], tmp_path / "out", SplitOptions(), say=said.append) == first
    with pytest.raises(UserError, match=r"with other settings; a split is not replaced.*; choose another --output-dir"):
        split([source], tmp_path / "out", SplitOptions(seed=2))
    write_jsonl(tmp_path / "in.jsonl", [prose(seed) for seed in range(51)])
    with pytest.raises(UserError, match="text that changed since"):
        split([source], tmp_path / "out", SplitOptions())
    (tmp_path / "out/split.json").unlink()  # a killed run leaves no record; what it wrote is replaced
    split([source], tmp_path / "out", SplitOptions())


def test_one_file_is_cut_into_passages_and_nothing_is_lost(tmp_path: Path) -> None:
    text = prose(1, 3000)
    (tmp_path / "novel.txt").write_text(text)
    said: list[str] = []
    split([Source(tmp_path / "novel.txt", "text")], tmp_path / "out", SplitOptions(), say=said.append)
    both = rows(tmp_path / "out", "train") + rows(tmp_path / "out", "validation")
    both.sort(key=lambda row: int(row["source"].partition("#")[2]))
    assert "".join(row["text"] for row in both) == text
    assert all(row["text"].endswith("\n\n") for row in both[:-1]), "cut at ends of paragraphs"
    assert any("1 documents are few" in line for line in said)


def test_one_huge_line_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("".join(str(number % 9973) for number in range(200_000)))
    report = split([Source(tmp_path / "line.txt", "text")], tmp_path / "out", SplitOptions(), say=lambda line: None)
    assert report["train"]["documents"] > 20 and report["validation"]["documents"] >= 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["short"] * 3, f"5 bytes of text in 1 documents; .* need {MIN_TEXT_BYTES:,} bytes together; add text"),
     ([], "0 bytes of text"),
     ([prose(1, 2000) + str(number) for number in range(30)], "1 groups of near-duplicates")],
)  # fmt: skip
def test_too_little_text_is_refused_with_what_is_needed(halve: Callable[..., Sides], texts: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        halve(texts)


def test_nine_kilobytes_are_enough(tmp_path: Path) -> None:
    (tmp_path / "small.md").write_text(prose(1, 1500)[:9000])
    report = split(find_sources([str(tmp_path)]), tmp_path / "out", SplitOptions(), tokenizer=ByteTokenizer())
    validation = report["validation"]
    assert 2000 <= validation["text_bytes"] <= 2400
    assert validation["tokens"] == validation["text_bytes"] + validation["documents"], "with ends of documents"


def test_a_wrong_key_names_the_keys_that_are_there_and_the_flag(tool: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [prose(seed) for seed in range(60)], key="body")
    flags = ("--input", tmp_path / "in.jsonl", "--output-dir", tmp_path / "out")
    done = tool("split_data.py", *flags)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "in.jsonl, line 1: no key 'text' (found: body, n; --json-keys chooses)" in done.stderr
    assert "and 40 more" in done.stderr and "--json-keys KEY" in done.stderr
    done = tool("split_data.py", *flags, "--json-keys", "body")
    assert done.returncode == 0, done.stderr
    assert "tokens of 4 bytes" in done.stdout and "took" in done.stdout


def test_a_folder_of_every_kind_with_odd_names(tool: Callable[..., Any], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "Meine Bücher"
    (folder / "tief/er").mkdir(parents=True)
    texts = {name: prose(seed) for seed, name in enumerate(
        ("a b.txt", "ü.md", "tief/c.py", "tief/er/d.rst", "e.html", "g.jsonl.gz", "h.parquet", "i.jsonl.zst"))}  # fmt: skip
    for name in list(texts)[:4]:
        (folder / name).write_text(texts[name])
    (folder / "e.html").write_text(f"<script>no</script><p>{texts['e.html']}</p>")
    line = json.dumps({"text": texts["g.jsonl.gz"]}).encode()
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(line))
    parquet.write_table(pyarrow.table({"text": [texts["h.parquet"]]}), folder / "h.parquet")
    with pyarrow.CompressedOutputStream(str(folder / "i.jsonl.zst"), "zstd") as stream:
        stream.write(json.dumps({"text": texts["i.jsonl.zst"]}).encode())
    (folder / "leer.txt").write_text("")
    (folder / "copy.txt").write_text(texts["a b.txt"])
    (folder / "brief.pdf").write_bytes(b"%PDF\xff")
    (folder / "tief/loop").symlink_to("..")
    for number in range(30):
        (folder / f"{number}.txt").write_text(prose(100 + number))
    (folder / "latin.txt").write_bytes("Straße".encode("latin-1"))
    flags = ("--input", folder, "--output-dir", tmp_path / "out")
    done = tool("split_data.py", *flags)
    assert done.returncode == 2 and "latin.txt, document 1: not UTF-8 (byte 0xdf at 4; " in done.stderr
    done = tool("split_data.py", *flags, "--skip-errors", "--validation-documents", "4")
    assert done.returncode == 0, done.stderr
    assert "brief.pdf" in done.stderr and "pdftotext" in done.stderr
    for line in ("left out: 1 empty documents", "left out: 1 exact copies", "left out: 1 malformed rows", "latin.txt"):
        assert line in done.stdout
    train, validation = rows(tmp_path / "out", "train"), rows(tmp_path / "out", "validation")
    assert (len(train), len(validation)) == (34, 4)
    found = {" ".join(row["text"].split()) for row in train + validation}
    assert {" ".join(text.split()) for text in texts.values()} <= found


def test_parquet_without_pyarrow_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    source = Source(tmp_path / "in.parquet", "parquet")
    with pytest.raises(UserError, match="pyarrow is not installed; parquet input needs it; run pip install pyarrow"):
        split([source], tmp_path / "out", SplitOptions(reading=ReadOptions()))


def test_one_spelling_of_the_key_in_all_tools(tool: Callable[..., Any], tmp_path: Path) -> None:
    spelling = "--json-keys"
    source = write_jsonl(tmp_path / "in.jsonl", ["some text"] * 9, key="body").path
    flags = (
        "--input",
        source,
        "--output",
        tmp_path / "out.jsonl",
        "--tokens",
        "30",
        "--tokenizer-type",
        "ByteTokenizer",
    )
    done = tool("make_subset.py", *flags)
    assert done.returncode == 2 and "(found: body, n; --json-keys chooses)" in done.stderr
    assert tool("make_subset.py", *flags, spelling, "body").returncode == 0
    flags = ("--input", source, "--output", tmp_path / "tokenizer", "--vocab-size", "300")
    done = tool("train_tokenizer.py", *flags)
    assert done.returncode == 2 and "(found: body, n; --json-keys chooses)" in done.stderr
    assert tool("train_tokenizer.py", *flags, spelling, "body").returncode == 0
