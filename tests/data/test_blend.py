"""Blends: the rule, proportions, data path files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron.data import blend
from megatron.data.blend import BlendOrder, blend_order, parse_blend, read_data_path_file
from megatron.data.dataset import BlendedDataset, GPTDataset, build_dataset, count_unique_tokens, describe


def reference_order(weights: list[float], num_samples: int) -> list[int]:
    """Apply the rule of the largest deficit one sample after the other."""
    total = 0.0
    for weight in weights:  # not sum(): from Python 3.12 on it compensates the rounding
        total += weight
    shares = [weight / total for weight in weights]
    counts = [0] * len(weights)
    order = []
    for sample in range(num_samples):
        deficits = [share * max(sample, 1.0) - count for share, count in zip(shares, counts)]
        choice = deficits.index(max(deficits))
        counts[choice] += 1
        order.append(choice)
    return order


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1, 1],
        [1, 1, 1],
        [0.3, 0.7],
        [0.25, 0.35, 0.4],
        [5, 1, 1, 3, 9, 9, 2],
        [1e-3, 0.5, 0.2, 0.3],
        [1e-6, 1.0, 2.0],
    ],
)
def test_order_is_that_of_the_rule(weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "_MIN_LANE", 64)  # many short lanes: starts must be corrected
    for num_samples in (1, 63, 64, 1000, 5001):
        assert blend_order(weights, num_samples).tolist() == reference_order(weights, num_samples)


def test_order_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "_MIN_LANE", 100)
    rng = np.random.default_rng(0)
    for trial in range(15):
        weights = (rng.dirichlet(np.full(rng.integers(2, 12), 0.3)) + 1e-5 if trial % 2 else rng.random(5)).tolist()
        assert blend_order(weights, 4000).tolist() == reference_order(weights, 4000)


def test_proportions_hold_at_every_point() -> None:
    weights = np.array([0.1, 0.25, 0.65])
    order = blend_order(weights, 20_000)
    for dataset in range(3):
        drawn = np.cumsum(order == dataset)
        assert np.abs(drawn - weights[dataset] * np.arange(1, 20_001)).max() < 2


def test_more_than_256_data_sets() -> None:
    for count in (257, 300):
        order = blend_order([1.0] * count, 3 * count)
        assert np.bincount(order, minlength=count).tolist() == [3] * count


def test_random_access() -> None:
    order = BlendOrder(blend_order([0.2, 0.5, 0.3], 10_000), 3)
    seen = [0, 0, 0]
    for index in range(10_000):
        dataset, place = order[index]
        assert place == seen[dataset]
        seen[dataset] += 1
    assert order.counts.tolist() == seen


def test_blended_samples_are_those_of_the_parts(make_data) -> None:
    one, two = make_data("one", [50, 70, 30]), make_data("two", [90, 10], start=1000)
    data = build_dataset(["0.3", one, "0.7", two], num_samples=100, seq_length=8, seed=5, name="train")
    again = build_dataset([f"3 {one}", f"7 {two}"], num_samples=100, seq_length=8, seed=5, name="train")
    assert isinstance(data, BlendedDataset)
    assert len(data) == 100
    # Each part has what Megatron asks for: its share and 0.5 % more, rounded up.
    parts = [GPTDataset(prefix, math.ceil(100 * w * 1.005), 8, 5) for prefix, w in ((one, 0.3), (two, 0.7))]
    seen = [0, 0]
    for index in range(100):
        sample = data[index]
        np.testing.assert_array_equal(sample, again[index])
        part = int(sample[0] >= 1000)
        np.testing.assert_array_equal(sample, parts[part][seen[part]])
        seen[part] += 1
    assert seen == [30, 70]
    assert data.tokens_per_epoch == 250
    assert data.num_epochs == pytest.approx(100 * 8 / 250)
    assert data.text_bytes_per_token is None
    text = describe(data)
    assert "250 tokens per epoch" in text
    assert "70 samples = 5.60 epochs" in text
    for index in (-1, 100):
        with pytest.raises(IndexError):
            data[index]


def test_full_pass_over_a_blend_reads_every_sample_once(make_data) -> None:
    one, two = make_data("one", [50, 71]), make_data("two", [41], start=1000)
    data = build_dataset(["0.9", one, "0.1", two], num_samples=None, seq_length=8, seed=5, name="valid")
    assert len(data) == 15 + 5
    inputs = np.concatenate([data[index][:-1] for index in range(len(data))])
    assert len(np.unique(inputs)) == 20 * 8


def test_one_prefix_with_a_weight_is_that_prefix(make_data) -> None:
    prefix = make_data("one", [50, 70, 30])
    plain = build_dataset([prefix], num_samples=40, seq_length=8, seed=5, name="train")
    weighted = build_dataset(["1.0", prefix + ".bin"], num_samples=40, seq_length=8, seed=5, name="train")
    assert isinstance(weighted, GPTDataset)
    assert plain.plan == weighted.plan
    assert plain.num_epochs == pytest.approx(40 * 8 / 150)
    assert count_unique_tokens(["1.0", prefix, "2.0", prefix]) == 150


def test_a_document_is_counted_once_whatever_names_it(make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file by two spellings, or a part of it that is read more often, made twice the tokens and half the epochs."""
    prefix = Path(make_data("one", [60, 10, 40, 30, 10]))
    monkeypatch.chdir(prefix.parent)
    twice = ["1", "one", "1", "./one"]
    assert count_unique_tokens(twice) == count_unique_tokens(["1", "one", "1", str(prefix)]) == 150
    assert count_unique_tokens(["1", "one@0.4:1", "1", "one@0:0.6"]) == 150
    assert count_unique_tokens(["1", "one@0.2:0.4", "1", "one", "2", "one@0.6:0.8"]) == 150
    assert count_unique_tokens(["1", "one@0:0.4", "1", "one@0.6:1"]) == 110
    mixed = build_dataset(twice, num_samples=60, seq_length=5, seed=5, name="x")
    assert mixed.tokens_per_epoch == 150 and mixed.num_epochs == pytest.approx(2.0)


def test_bytes_per_token_come_from_the_meta(make_data) -> None:
    one, two = make_data("one", [50]), make_data("two", [50])
    Path(one + ".meta.json").write_text('{"tokens": 50, "text_bytes": 200}')
    assert build_dataset([one], num_samples=4, seq_length=8, seed=5, name="x").text_bytes_per_token == 4.0
    assert (
        build_dataset(["1", one, "1", two], num_samples=4, seq_length=8, seed=5, name="x").text_bytes_per_token is None
    )
    Path(two + ".meta.json").write_text('{"tokens": 50, "text_bytes": 100}')
    mixed = build_dataset(["1", one, "3", two], num_samples=400, seq_length=8, seed=5, name="x")
    assert mixed.text_bytes_per_token == pytest.approx(0.25 * 4 + 0.75 * 2)
    whole = build_dataset(["1", one, "3", two], num_samples=None, seq_length=8, seed=5, name="x")
    assert whole.text_bytes_per_token == pytest.approx(3), "what is read, whatever the weights say"
    Path(two + ".meta.json").write_text('{"tokens": 50, "text_bytes": 0}')
    assert build_dataset([two], num_samples=4, seq_length=8, seed=5, name="x").text_bytes_per_token is None


def test_data_path_files(tmp_path: Path) -> None:
    cases = {
        '"1.0 path/prefix"': [(1.0, "path/prefix")],
        "1.0 path/prefix\n": [(1.0, "path/prefix")],
        '"0.3 a" "0.7 b c"\n\n': [(0.3, "a"), (0.7, "b c")],
        '"0.3\ta" "0.7   b c"': [(0.3, "a"), (0.7, "b c")],
        "path/prefix": [(1.0, "path/prefix")],
    }
    for text, expected in cases.items():
        (tmp_path / "paths").write_text(text)
        assert parse_blend(read_data_path_file(tmp_path / "paths")) == expected
    for text, problem in (('"1.0 a', "no closing quotation"), ('"1 a"\n"2 b"', "2 lines"), ("", "0 lines")):
        (tmp_path / "paths").write_text(text)
        with pytest.raises(ValueError, match=rf"paths: {problem}; it must hold one line"):
            read_data_path_file(tmp_path / "paths")
    (tmp_path / "paths").write_bytes(b"\xef\xbb\xbf0.3 a 0.7 b")  # as some editors write it
    assert parse_blend(read_data_path_file(tmp_path / "paths")) == [(0.3, "a"), (0.7, "b")]
    with pytest.raises(ValueError, match=r"cannot read the data path file .*absent"):
        read_data_path_file(tmp_path / "absent")


@pytest.mark.parametrize("items", [[], [""], ["a", "b"], ["0.5", "a", "0.5"], ["0.5", "a", "b", "0.5"], ["3"]])
def test_wrong_blends(items: list[str]) -> None:
    with pytest.raises(ValueError, match="it must be one prefix, or pairs of a weight and a prefix; write"):
        parse_blend(items)


@pytest.mark.parametrize("weight", ["0", "-0.0", "-1", "nan", "inf", "1e400", "1e308"])
def test_wrong_weights(weight: str) -> None:
    with pytest.raises(ValueError, match=r"weight of a in .*; weights are above 0"):
        parse_blend([weight, "a", "1", "b"])


def test_a_data_set_may_be_called_like_a_number(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data("2024", [50])
    monkeypatch.chdir(tmp_path)
    assert parse_blend(["2024"]) == [(1.0, "2024")]
    assert parse_blend(["0.5", "2024", "0.5", "b"]) == [(0.5, "2024"), (0.5, "b")]


def test_data_sets_of_a_blend_have_the_samples_that_it_needs(make_data) -> None:
    part = GPTDataset(make_data("one", [50]), 4, 8, 5)
    with pytest.raises(ValueError, match=r"has 6 samples; the blend needs 50 of it"):
        BlendedDataset([1.0, 1.0], [part, part], blend_order([1.0, 1.0], 100))
