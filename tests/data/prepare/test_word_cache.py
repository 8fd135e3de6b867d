"""The word cache gives exactly what the library gives."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from data.conftest import GOLDEN
from megatron.data.prepare import word_cache
from megatron.data.prepare.word_cache import KNOWN_RANGES, WordCache, applies_to, batch_encoder
from megatron.data.tokenizer import ByteTokenizer, gpt2_bpe


@pytest.fixture(scope="module")
def backend(gpt2_files: tuple[str, str]) -> Any:
    return gpt2_bpe(*gpt2_files).backend


def library(backend: Any, texts: list[str]) -> list[list[int]]:
    return [item.ids for item in backend.encode_batch(texts, add_special_tokens=False)]


def words(backend: Any, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_every_known_character_is_classified_as_in_the_library(backend: Any) -> None:
    for first, last in KNOWN_RANGES:
        for code in range(first, last + 1):
            for text in (
                f"a{chr(code)}b",
                f"1{chr(code)}2",
                f"!{chr(code)}?",
                f"a {chr(code)} {chr(code)}",
                f"\n{chr(code)}",
            ):
                assert word_cache._KNOWN.fullmatch(text)
                assert word_cache._CUT.findall(text) == words(backend, text), f"U+{code:04X}"


def test_random_text(backend: Any) -> None:
    rng = random.Random(0)
    pieces = [
        "'s",
        "'re",
        "'LL",
        "don't",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2003",
        "“",
        "”",
        "…",
        "—",
        "é",
        "Ŋ",
        "½",
    ]
    pieces += [
        "²",
        "€",
        "12",
        "3.5",
        "abc",
        "Word",
        "x" * 100,
        "_",
        "'",
        "''",
        "!?",
        "\x00",
        "\x85",
        "<|endoftext|>",
        "ª",
        "ⅷ",
    ]
    strange = ["日本", "🙂", "\x1c", "\u0301", "ß", "и"]  # mostly outside the known ranges
    texts = ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(1500)]
    texts += ["".join(rng.choices(pieces + strange, k=rng.randrange(30))) for _ in range(1500)]
    cache = WordCache(backend)
    expected = library(backend, texts)
    for start in range(0, 3000, 500):
        assert cache.encode_batch(texts[start : start + 500]) == expected[start : start + 500]
    assert cache.encode_batch(texts) == expected  # now from the cache
    assert max(map(len, cache._ids)) <= 64


def test_real_text_and_a_cache_that_is_full(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.loads(line)["text"] for line in (GOLDEN / "golden.jsonl").read_text().splitlines()] * 2
    expected = library(backend, texts)
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 100)
    cache = WordCache(backend)
    assert [ids for text in texts for ids in cache.encode_batch([text])] == expected
    assert len(cache._ids) < 400
    assert cache.encode_batch([]) == []


def test_used_only_where_it_is_exact() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    assert not applies_to(backend)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert applies_to(backend)
    changes: list[dict[str, Any]] = [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
    ]
    spec = json.loads(backend.to_str())
    for change in changes:
        assert not applies_to(tokenizers.Tokenizer.from_str(json.dumps(spec | change))), change
    other = tokenizers.Tokenizer.from_str(json.dumps(spec))
    other.add_special_tokens(["<|mask|>"])
    assert applies_to(other)
    other.add_tokens(["hello"])
    assert not applies_to(other)


def test_other_tokenizers_encode_as_they_do(gpt2_files: tuple[str, str]) -> None:
    texts = ["one two", "three"]
    gpt2, byte = gpt2_bpe(*gpt2_files), ByteTokenizer()
    assert batch_encoder(byte) == byte.encode_batch != batch_encoder(gpt2)
    assert batch_encoder(gpt2)(texts) == gpt2.encode_batch(texts)
