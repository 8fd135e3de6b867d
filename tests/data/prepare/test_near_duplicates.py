"""Shared runs of words tell near-duplicates, the same on every machine."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron.data.prepare.near_duplicates import RUN_WORDS, RunHashes, Runs


def words(seed: int, count: int = 60) -> str:
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(10**6)}" for _ in range(count))


def runs_of(*texts: str, keep_one_in: int = 1) -> Runs:
    hashes = RunHashes(keep_one_in)
    return Runs([hashes(text) for text in texts])


def test_hashes_are_those_of_every_machine_and_day() -> None:
    (value,) = RunHashes()("The quick, brown fox").tolist()
    assert value == RunHashes()("the QUICK brown  fox!")[0] == 4673190666680594175


def test_the_runs_of_a_text_are_counted_without_case_and_punctuation() -> None:
    assert len(RunHashes()(words(1, 60))) == 60 - RUN_WORDS + 1
    assert len(RunHashes()("!!! ???")) == len(RunHashes()("three words only")) == 1
    assert len(RunHashes()("第一章" + "日月火水木金土")) == 10 - RUN_WORDS + 1, "a character is a word"


def test_near_duplicates_share_a_group_and_others_do_not() -> None:
    long, other = words(1, 200), words(2, 200)
    inside = " ".join(long.split()[50:110])
    edited = long.replace(long.split()[100], "changed") + " " + words(3, 30)
    labels = runs_of(long, other, inside, edited, words(4)).groups(0.5)
    assert labels.tolist() == [0, 1, 0, 0, 4]


@pytest.mark.parametrize(("shared", "is_near"), [(31, True), (29, False)])
def test_the_threshold_is_a_part_of_the_shorter_document(shared: int, is_near: bool) -> None:
    common = words(5, shared + RUN_WORDS - 1)
    short, long = common + " " + words(6, 60 - shared), words(7, 500) + " " + common  # the shorter one has 60 runs
    labels = runs_of(short, long).groups(0.5)
    assert (labels[0] == labels[1]) == is_near


def test_many_copies_are_one_group_and_common_boilerplate_is_none() -> None:
    licence = words(8, 40)
    copies = [words(9, 100) + f" copy{index}" for index in range(50)]
    files = [licence + " " + words(100 + index, 200) for index in range(50)]
    labels = runs_of(*copies, *files).groups(0.5)
    assert len(set(labels[:50].tolist())) == 1
    assert len(set(labels[50:].tolist())) == 50


def test_overlap_is_the_part_of_a_documents_runs_that_the_others_hold() -> None:
    text = words(10, 107)  # 100 runs
    parts = [" ".join(text.split()[:57]), " ".join(text.split()[50:])]  # 50 runs each of the whole's 100
    runs = runs_of(text, *parts, words(11))
    overlap = runs.overlap(np.array([True, False, False, True]))
    assert overlap[0] == 1.0 and overlap[3] == 0.0, "two halves hold the whole, though none is most of it"
    assert runs.overlap(np.array([True, True, True, True])).tolist() == [0.0] * 4


def test_of_a_large_input_a_part_of_the_runs_tells_the_same() -> None:
    text = words(12, 20_000)
    half = " ".join(text.split()[:10_000])
    runs = runs_of(half, text, words(13, 10_000), keep_one_in=20)
    assert 300 < runs.sizes[0] < 700
    assert runs.groups(0.5).tolist() == [0, 0, 2]
    assert runs_of("few words", keep_one_in=10**6).sizes.tolist() == [1]
