"""Documents inside a sample: where they begin, and what the flags make of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config.schema import DataConfig
from megatron.data.blend import blend_order
from megatron.data.dataset import BlendedDataset, GPTDataset
from megatron.data.loader import ONE_STREAM, Packing, Share, build_loader, build_packing, places_in_documents
from megatron.errors import UserError
from megatron.objectives import parse
from megatron.objectives.ar import Autoregressive
from megatron.parallel.context import Axis

SIZES = [5, 1, 12, 40, 3, 9, 0, 7, 2, 1]


def owner(tokens: np.ndarray) -> np.ndarray:
    """Document of each token of data whose tokens count upwards."""
    return np.searchsorted(np.cumsum(SIZES), tokens, side="right")


def test_pieces_name_the_document_of_every_token(make_data: Callable[..., str]) -> None:
    dataset = GPTDataset(make_data("d", SIZES), 60, 16, seed=1)
    several = 0
    for index in range(len(dataset)):
        tokens, (documents, places) = dataset[index], dataset.pieces(index)
        assert np.array_equal(documents, owner(tokens)) and documents.dtype == places.dtype == np.int64
        is_boundary = (np.diff(tokens) != 1) | (np.diff(documents) != 0)
        assert np.array_equal(np.diff(places) > 0, is_boundary) and (np.diff(places) >= 0).all()
        several += len(np.unique(documents)) > 1
    assert several > len(dataset) / 2
    with pytest.raises(IndexError):
        dataset.pieces(len(dataset))


def test_a_document_after_itself_is_two_pieces(make_data: Callable[..., str]) -> None:
    dataset = GPTDataset(make_data("d", [6]), 8, 16, seed=1)
    documents, places = dataset.pieces(0)
    assert set(documents) == {0}
    assert np.array_equal(np.diff(places), (np.diff(dataset[0]) != 1).astype(int))


def test_documents_of_a_blend_are_counted_through(make_data: Callable[..., str]) -> None:
    parts = [GPTDataset(make_data(name, SIZES), 40, 16, seed=1) for name in ("a", "b")]
    blend = BlendedDataset([0.5, 0.5], parts, blend_order([0.5, 0.5], 40))
    found = {part: set() for part in range(2)}
    for index in range(40):
        part, place = blend.order[index]
        own, (documents, places) = parts[part].pieces(place), blend.pieces(index)
        assert np.array_equal(documents, own.documents + 10 * part) and np.array_equal(places, own.places)
        found[part] |= set(documents)
    assert not found[0] & found[1]


def test_documents_of_a_prefix_that_is_named_twice_are_the_same(make_data: Callable[..., str]) -> None:
    """Or a validation set that is named twice would halve the variance of its mean."""
    parts = [GPTDataset(make_data(name, SIZES), 40, 16, seed=1) for name in ("b", "a")]
    parts.append(GPTDataset(parts[1].documents.prefix, 40, 16, seed=1))
    blend = BlendedDataset([0.2, 0.4, 0.4], parts, blend_order([0.2, 0.4, 0.4], 40))
    seen = {part: set() for part in range(3)}
    for index in range(40):
        seen[blend.order[index][0]] |= set(blend.pieces(index).documents.tolist())
    assert not seen[0] & seen[1] and max(seen[1] | seen[2]) < 20 and seen[1] & seen[2]


def test_positions_begin_again_with_every_segment() -> None:
    segments = np.array([[0, 0, 0, 1, 1, 3, 3], [2, 2, 2, 2, 2, 2, 2]])
    assert places_in_documents(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [ONE_STREAM, Packing(True), Packing(False, True), Packing(True, True, eod_id=17)])
def test_the_loader_gives_what_is_asked_for(make_data: Callable[..., str], packing: Packing, num_workers: int) -> None:
    dataset = GPTDataset(make_data("d", SIZES), 24, 16, seed=1)
    loader = build_loader(
        dataset, Autoregressive(), Share(Axis(), 8, last_sample=24), device=torch.device("cpu"), num_workers=num_workers,
        packing=packing,
    )  # fmt: skip
    left_out = 0
    for inputs, targets in loader:
        pieces = [dataset.pieces(sample) for sample in inputs.sample_ids.tolist()]
        places = np.stack([piece.places[:-1] for piece in pieces])
        assert (inputs.position_ids is not None) == packing.reset_positions
        assert (inputs.segment_ids is not None) == packing.reset_attention
        if inputs.position_ids is not None:
            assert np.array_equal(inputs.position_ids.numpy(), places_in_documents(places))
        if inputs.segment_ids is not None:
            assert np.array_equal(inputs.segment_ids.numpy(), places)
        ends = inputs.input_ids == packing.eod_id if packing.eod_id is not None else torch.zeros(8, 16).bool()
        assert torch.equal(targets.loss_weights, (~ends).float())
        assert targets.num_tokens.tolist() == (16 - ends.sum(-1)).tolist()
        left_out += int(ends.sum())
    assert (left_out > 0) == (packing.eod_id is not None)


def test_the_last_round_of_all_samples_is_filled_with_the_last_one(make_data: Callable[..., str]) -> None:
    dataset = GPTDataset(make_data("d", SIZES), None, 16, seed=1)
    share = Share(Axis(), 3, last_sample=len(dataset))
    loader = build_loader(dataset, Autoregressive(), share, device=torch.device("cpu"), num_workers=0)
    *_, (inputs, _) = loader
    assert len(dataset) == 4 and inputs.sample_ids.tolist() == [3, 4, 5]
    assert np.array_equal(inputs.input_ids.numpy(), np.stack([dataset[3][:-1]] * 3))


@pytest.mark.parametrize("consumed", [0, 12])
def test_ranks_share_the_stream_round_by_round(consumed: int) -> None:
    """Micro-batch m of rank r begins at ``(m · dp + r) · micro`` behind what was consumed; the last round is filled up."""
    ranks = [list(Share(Axis(rank, 3), 2, last_sample=40, first_sample=consumed)) for rank in range(3)]
    for rank, micro_batches in enumerate(ranks):
        first = [consumed + (number * 3 + rank) * 2 for number in range(-(-(40 - consumed) // 6))]
        assert micro_batches == [[sample, sample + 1] for sample in first]
    read = sorted(sample for own in ranks for micro_batch in own for sample in micro_batch)
    assert read[: 40 - consumed] == list(range(consumed, 40)) and len(set(read)) == len(read)


def flags(*words: object) -> DataConfig:
    shape = ["--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "1", "--train-samples", "8"]
    return parse([*shape, *map(str, words)], objective="ar").data


def test_flags_say_what_is_reset(make_data: Callable[..., str]) -> None:
    data = ["--train-data-path", make_data("d", SIZES)]
    assert build_packing(flags(*data)) == ONE_STREAM
    assert build_packing(flags(*data, "--reset-position-ids")) == Packing(reset_positions=True)
    assert build_packing(flags(*data, "--reset-attention-mask")) == Packing(reset_attention=True)


def test_the_eod_token_comes_from_the_data_or_the_tokenizer(make_data: Callable[..., str]) -> None:
    one, two = make_data("one", SIZES), make_data("two", SIZES)
    Path(f"{one}.meta.json").write_text(json.dumps({"eod_id": 17}))
    assert build_packing(flags("--train-data-path", one, "--eod-mask-loss")).eod_id == 17
    tokenizer = ["--tokenizer-type", "ByteTokenizer"]
    assert build_packing(flags("--train-data-path", two, "--eod-mask-loss", *tokenizer)).eod_id == 256
    with pytest.raises(UserError, match="end-of-document"):
        build_packing(flags("--train-data-path", two, "--eod-mask-loss"))
    with pytest.raises(UserError, match="end-of-document"):
        build_packing(flags("--train-data-path", two, "--eod-mask-loss", "--tokenizer-type", "NullTokenizer",
                            "--vocab-size", 100))  # fmt: skip
    Path(f"{two}.meta.json").write_text(json.dumps({"eod_id": 18}))
    with pytest.raises(UserError, match=r"\[17, 18\]"):
        build_packing(flags("--train-data-path", one, "--valid-data-path", two, "--eod-mask-loss"))
