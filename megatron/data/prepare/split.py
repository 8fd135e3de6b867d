"""Own text into a training and a validation side, by document. tools/split_data.py is its command line.

No validation document is nearly in the training text: near-duplicates (near_duplicates.py) go to one side together, and a
document too many of whose runs of words are anywhere in the training text goes to training. The choice depends on the
texts and the seed alone, not on the names of files or their order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.prepare.documents import Documents, ReadOptions, Scan
from megatron.data.prepare.near_duplicates import RUN_WORDS, Runs
from megatron.data.prepare.readers import Source
from megatron.data.tokenizer import Tokenizer
from megatron.errors import UserError
from megatron.files import make_folder, replace_file, sha256_of

MIN_TEXT_BYTES = 8192  # of both sides together: a few samples of a hundred tokens each
MIN_VALIDATION_BYTES = 2048
FEW_DOCUMENTS = 20  # fewer are cut into passages
SIDES = ("train", "validation")
FILES, CONTENT = "files_sha256", "content_sha256"  # of split.json: names, sizes and times of the files; what they hold
_PASSAGES = 40  # about as many are made
_PASSAGE_CHARACTERS = (256, 20_000)
_SLACK = 1.1  # a side may be larger than was asked for: documents are not cut to fit


@dataclass(frozen=True)
class SplitOptions:
    """How to split.

    Attributes:
        fraction: part of the bytes for validation.
        documents: validation documents, instead of ``fraction``.
        max_validation_bytes: at most about so much validation text; None: any.
        near_duplicates: part of the shorter document's runs of words that makes two documents near-duplicates.
        seed: another seed chooses other documents.
        reading: which texts.
    """

    fraction: float = 0.05
    documents: int | None = None
    max_validation_bytes: int | None = None
    near_duplicates: float = 0.5
    seed: int = 1234
    reading: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class _Choice:
    """Which documents are for validation (bool), the part of their runs in training, documents with near-duplicates."""

    is_validation: np.ndarray
    overlap: float
    near_duplicates: int


def split(
    sources: Sequence[Source],
    folder: Path,
    options: SplitOptions,
    *,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write FOLDER/train.jsonl, validation.jsonl and split.json (what was done, from what).

    A folder that was made of the same text with the same settings is left as it is.

    Args:
        sources: from ``find_sources``.
        folder: made where it is missing.
        options: how.
        tokenizer: counts tokens; None estimates them.
        say: gets a line at a time of what is found and done.

    Returns:
        The contents of split.json.

    Raises:
        UserError: malformed rows, too little text, no split, or a folder made of something else.
    """
    made_of = _made_of(sources, options)
    if (found := _earlier(folder, made_of, sources)) is not None:
        say(f"{folder}: split before, of the same text; kept")
        return found
    started = time.monotonic()
    reader = Documents(sources, options.reading, seed=options.seed)
    say(f"reading {reader.total_bytes:,} bytes in {len(sources):,} files")
    scan = reader.scan()
    if 0 < len(scan.sizes) < FEW_DOCUMENTS:
        few, (low, high) = len(scan.sizes), _PASSAGE_CHARACTERS
        reader.passage_characters = min(max(sum(scan.sizes) // _PASSAGES, low), high)
        scan = reader.scan()
        say(f"{few} documents are few: cut at ends of paragraphs into {len(scan.sizes)} passages")
    left_out = {"empty documents": scan.empty, "exact copies": scan.copies, "malformed rows": reader.malformed}
    for line in [f"{number:,} {what}" for what, number in left_out.items() if number] + reader.errors:
        say(f"left out: {line}")
    choice = _choose(scan, options)
    say(
        f"{choice.near_duplicates:,} of {len(scan.sizes):,} documents are near-duplicates of others ({RUN_WORDS}-word runs: "
        f"at least {options.near_duplicates:.0%} of the shorter one's shared); they share a side"
    )
    make_folder(folder)
    made_of |= {CONTENT: _content_of(sources)}
    report: dict[str, Any] = {"made_of": made_of, "left_out": left_out, "near_duplicates": choice.near_duplicates}
    for side, name in enumerate(SIDES):
        path = folder / f"{name}.jsonl"
        report[name] = written = reader.write(path, choice.is_validation == side, tokenizer)
        tokens = f"{written['tokens']:,} tokens" if tokenizer else f"about {written['tokens']:,} tokens of 4 bytes"
        say(f"{path}: {written['documents']:,} documents, {written['text_bytes']:,} bytes of text, {tokens}")
    report |= {"overlap": choice.overlap, "seconds": round(time.monotonic() - started, 1)}
    say(f"{choice.overlap:.1%} of validation's {RUN_WORDS}-word runs are in training too; took {report['seconds']} s")
    replace_file(folder / "split.json", json.dumps(report, indent=1) + "\n")
    return report


def _made_of(sources: Sequence[Source], options: SplitOptions) -> dict[str, Any]:
    """What decides the result: settings, and names, sizes and times of the files."""
    digest = hashlib.sha256()
    for source in sources:
        state = source.path.stat()
        name = str(source.path.resolve()).encode("utf-8", "surrogateescape")
        digest.update(b"%s\0%s\0%d\0%d\n" % (name, source.format.encode(), state.st_size, state.st_mtime_ns))
    return {"files": len(sources), FILES: digest.hexdigest(), **asdict(options)}


def _content_of(sources: Sequence[Source]) -> str:
    """What the files hold, wherever they lie and however old they are. Their own names are in what is written."""
    digest = hashlib.sha256()
    for source in sources:
        files = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
        for file in (file for file in files if file.is_file()):
            name = file.name.encode("utf-8", "surrogateescape")
            digest.update(b"%s\0%s\0%s\n" % (name, source.format.encode(), sha256_of(file).encode()))
    return digest.hexdigest()


def _earlier(folder: Path, made_of: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any] | None:
    """The record of a split that is there already; None where there is none, not even a part of one.

    Files that are where they were, of the size and time of then, are not read.

    Raises:
        UserError: it was made of something else.
    """
    record = folder / "split.json"
    if not record.exists():
        return None  # what a killed run wrote is replaced
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        before = dict(found["made_of"])
        content = before.pop(CONTENT, None)
        is_same = {**before, FILES: None} == {**made_of, FILES: None}
        if is_same and (before[FILES] == made_of[FILES] or content == _content_of(sources)):
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{folder} holds a split of other text, of text that changed since, or with other settings",
        "a split is not replaced: token files and runs may be made of it",
        "choose another --output-dir (laptop.sh: another RUN_NAME), or remove the folder",
    )


def _choose(scan: Scan, options: SplitOptions) -> _Choice:
    """Choose the validation side.

    Raises:
        UserError: too little text, or no choice keeps near-duplicates together.
    """
    if sum(scan.sizes) < MIN_TEXT_BYTES:
        raise UserError(
            f"{sum(scan.sizes):,} bytes of text in {len(scan.sizes):,} documents",
            f"a training and a validation side need {MIN_TEXT_BYTES:,} bytes together",
            "add text: curves that mean something need 100,000 bytes, a short novel",
        )
    order = np.array(sorted(range(len(scan.ranks)), key=scan.ranks.__getitem__))  # at random, by the texts and the seed
    sizes = np.array(scan.sizes, np.int64)[order]
    runs = Runs([scan.runs[index] for index in order])
    labels = runs.groups(options.near_duplicates)
    open_groups = set(labels.tolist())
    num_groups = len(open_groups)
    while True:  # every turn but the last closes a group: it goes to training
        chosen = _fill(labels, sizes, open_groups, options)
        overlap = runs.overlap(chosen)
        leaking = set(labels[chosen & (overlap >= options.near_duplicates)].tolist())
        if not leaking:
            break
        open_groups -= leaking
    if not chosen.any() or chosen.all():
        raise UserError(
            f"{len(sizes):,} documents in {num_groups:,} groups of near-duplicates, with which no choice fills both sides",
            f"documents that share {options.near_duplicates:.0%} of their {RUN_WORDS}-word runs stay together",
            "change --validation-fraction or --validation-documents, raise --near-duplicates, or add other text",
        )
    is_validation = np.zeros(len(sizes), bool)
    is_validation[order] = chosen
    mean = float((overlap * runs.sizes)[chosen].sum() / runs.sizes[chosen].sum())
    return _Choice(is_validation, mean, int((np.bincount(labels)[labels] > 1).sum()))


def _fill(labels: np.ndarray, sizes: np.ndarray, open_groups: set[int], options: SplitOptions) -> np.ndarray:
    """Return the documents, bool, of the first groups that fit into the validation side; of the smallest when none does."""
    total, bytes_of = int(sizes.sum()), np.bincount(labels, sizes)
    if options.documents is not None:
        wanted, largest = float(options.documents), float(options.documents)
        weights: np.ndarray = np.bincount(labels)
        room = max(options.max_validation_bytes or total, MIN_VALIDATION_BYTES) * _SLACK
    else:
        wanted = max(min(options.fraction * total, options.max_validation_bytes or total), MIN_VALIDATION_BYTES)
        largest, weights = wanted * _SLACK, bytes_of
        room = largest
    taken: list[int] = []
    filled = used = 0.0
    for label in sorted(open_groups):
        if filled < wanted and filled + weights[label] <= largest and used + bytes_of[label] <= room:
            taken.append(label)
            filled, used = filled + weights[label], used + bytes_of[label]
    if not taken and open_groups and options.documents is None:
        smallest = min(open_groups, key=lambda label: (weights[label], label))
        if weights[smallest] <= total / 2:
            taken = [smallest]
    return np.isin(labels, taken)
