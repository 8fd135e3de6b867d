"""A seeded storm of damages over every file of a data set and its index cache; STORM=1 makes it 25 times as long.

Outcomes: ``detected`` (a UserError), ``rebuilt`` (a warning, and the right samples), ``harmless`` (the right samples and
facts), ``silent`` (anything else). Any other exception fails the test.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.dataset import GPTDataset, text_bytes_per_token
from megatron.data.identity import check_vocabulary, tokenizer_fingerprint, verify_data
from megatron.data.indexed import read_meta
from megatron.data.prepare.preprocess import PreprocessOptions, preprocess
from megatron.data.prepare.readers import Source
from megatron.data.tokenizer import ByteTokenizer
from megatron.errors import UserError

TRIALS = 60 * (25 if os.environ.get("STORM") else 1)  # a file and setting
MAPS = ("document_order.npy", "sample_starts.npy", "sample_order.npy", "plan.json")


@dataclass(frozen=True)
class Victim:
    """A data set, the folder of its index maps, and what a start with it sees."""

    prefix: str
    cache: Path
    expected: tuple[Any, ...]

    def path(self, kind: str) -> Path:
        if not kind.startswith("."):
            return next(self.cache.glob("train-*/")) / kind
        return Path(self.prefix + kind)


def start(prefix: str, cache: Path, *, verify: bool) -> tuple[Any, ...]:
    """Everything that a training run takes from a data set."""
    check_vocabulary([prefix], vocab_size=257, fingerprints=[tokenizer_fingerprint(ByteTokenizer())])
    if verify:
        verify_data([prefix])
    data = GPTDataset(prefix, 300, 16, 7, cache_path=str(cache))
    samples = np.stack([data[index] for index in range(len(data))])
    meta = read_meta(prefix) or {}
    facts = {name: meta.get(name) for name in ("vocab_size", "eod_id", "tokenizer")}
    return samples.tobytes(), data.plan, text_bytes_per_token(prefix), json.dumps(facts)


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    rng = np.random.default_rng(0)
    with open(tmp_path / "x.jsonl", "w") as file:
        for size in rng.integers(1, 120, 40):
            file.write(json.dumps({"text": "".join(chr(c) for c in rng.integers(32, 300, size))}) + "\n")
    options = PreprocessOptions(str(tmp_path / "x"), append_eod=True)
    preprocess([Source(tmp_path / "x.jsonl", "jsonl")], ByteTokenizer(), options)
    prefix, cache = options.prefix("text"), tmp_path / "cache"
    return Victim(prefix, cache, start(prefix, cache, verify=True))


def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    """One random damage: a flipped bit (half of the time), a cut, zeros, noise, or bytes too many."""
    kind = rng.choice(["flip", "cut", "zero", "noise", "grow"], p=[0.5, 0.2, 0.1, 0.1, 0.1])
    place = int(rng.integers(len(raw)))
    length = int(rng.integers(1, 200))
    if kind == "cut":
        return raw[:place]
    if kind == "grow":
        return raw + rng.bytes(length)
    out = bytearray(raw)
    if kind == "flip":
        out[place] ^= 1 << int(rng.integers(8))
    else:
        end = min(len(raw), place + length)
        out[place:end] = bytes(end - place) if kind == "zero" else rng.bytes(end - place)
    return bytes(out)


def outcome(victim: Victim, *, verify: bool) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = start(victim.prefix, victim.cache, verify=verify)
        except UserError:
            return "detected"
    if found != victim.expected:
        return "silent"
    return "rebuilt" if any("damaged index cache" in str(warning.message) for warning in caught) else "harmless"


@pytest.mark.parametrize(
    ("kind", "verify"),
    [*((kind, False) for kind in (".bin", ".idx", ".meta.json", *MAPS)), (".bin", True), (".idx", True)],
)
def test_storm(victim: Victim, kind: str, verify: bool) -> None:
    rng = np.random.default_rng([TRIALS, len(kind), verify])
    counts: Counter[str] = Counter()
    raw = victim.path(kind).read_bytes()
    for _ in range(TRIALS):
        broken = damaged(raw, rng)
        if broken == raw:  # zeros over zeros
            continue
        victim.path(kind).write_bytes(broken)
        counts[outcome(victim, verify=verify)] += 1
        victim.path(kind).write_bytes(raw)
    print(f"{kind}{' with --verify-data' if verify else ''}: {dict(sorted(counts.items()))}")
    assert counts["detected"] + counts["rebuilt"] > 0
    if kind != ".bin" or verify:
        assert counts["silent"] == 0
