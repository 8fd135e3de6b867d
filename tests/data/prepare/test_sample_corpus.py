"""The sample corpus: no leakage, the same every time; the quickstart's three tools one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from megatron.data.prepare.sample_corpus import Document, read_documents, shared_runs, split_documents


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return read_documents()


def size(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def test_documents(documents: list[Document]) -> None:
    assert size(documents) > 1_000_000
    assert min(len(document.text) for document in documents) >= 200
    assert len({document.source for document in documents}) == len(documents)
    assert len({" ".join(document.text.lower().split()) for document in documents}) == len(documents)
    texts = {document.source: document.text for document in documents}
    assert "def dumps(obj, *, skipkeys=False" in texts["json"]


def test_split_leaks_nothing(documents: list[Document]) -> None:
    train, validation = split_documents(documents)
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(documents)
    assert 0.03 < size(validation) / size(documents) <= 0.05
    assert len(validation) >= 20
    assert not shared_runs(train, validation)
    everything = " ".join(" ".join(document.text.split()) for document in train)
    for document in validation:  # the same, said without the code under test
        words = document.text.split()
        assert not any(" ".join(words[i : i + 20]) in everything for i in range(0, len(words) - 19, 20))


def test_split_keeps_related_documents_together() -> None:
    shared = " ".join(f"w{i}" for i in range(13))
    filler = [" ".join(f"x{i}_{j}" for j in range(60)) for i in range(30)]
    texts = [f"{text} {shared} end{i}" if i < 2 else text for i, text in enumerate(filler)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    for seed in range(20):
        train, validation = split_documents(documents, seed=seed, validation_fraction=0.3)
        assert len(train) + len(validation) == 30
        assert len({"0", "1"} & {document.source for document in train}) in (0, 2)
        assert validation
    assert shared_runs([documents[0]], [documents[1]]) == {shared}


def test_seed_and_size(documents: list[Document]) -> None:
    documents = documents[-400:]
    assert split_documents(documents, seed=1) == split_documents(documents, seed=1)
    assert split_documents(documents, seed=1) != split_documents(documents, seed=2)
    train, validation = split_documents(documents, max_bytes=200_000, validation_fraction=0.1)
    assert 180_000 < size(train) + size(validation) <= 200_000
    assert 10_000 < size(validation) <= 20_000
    with pytest.raises(ValueError, match="raise --max-bytes"):
        split_documents(documents, max_bytes=100)
    with pytest.raises(ValueError, match="must be above 0 and at most"):
        split_documents(documents, validation_fraction=0.9)


def test_corpus_tokenizer_and_data_by_command(tool, tmp_path: Path, documents: list[Document]) -> None:
    done = tool("make_sample_corpus.py", "--output-dir", tmp_path, "--max-bytes", 300_000)
    assert done.returncode == 0, done.stderr
    assert "no run of 13 words is in both files" in done.stdout
    sides = []
    for name in ("train", "validation"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        sides.append([json.loads(line) for line in lines])
    expected = split_documents(documents, max_bytes=300_000)  # another process, with another hash seed, has the same
    for side, wanted in zip(sides, expected):
        assert [(row["source"], row["text"]) for row in side] == [
            (document.source, document.text) for document in wanted
        ]
    train = tmp_path / "train.jsonl"
    done = tool("train_tokenizer.py", "--input", train, "--vocab-size", 1024, "--output", tmp_path / "tok")
    assert done.returncode == 0, done.stderr
    assert "1,024 ids, end of document 0" in done.stdout
    done = tool(
        "preprocess_data.py", "--input", train, "--output-prefix", tmp_path / "train", "--tokenizer-model",
        tmp_path / "tok", "--append-eod", "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = IndexedDataset(tmp_path / "train_text_document")
    assert len(data) == len(sides[0])
    assert all(data[index][-1] == 0 for index in range(len(data)))
    done = tool("train_tokenizer.py", "--input", train, "--vocab-size", 5, "--output", tmp_path / "tok2")
    assert done.returncode == 2
    assert "needs 257 ids" in done.stderr
