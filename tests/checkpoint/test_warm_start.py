"""AR -> MDM: the mask embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.tensors import save_full_checkpoint
from megatron.checkpoint.warm_start import VOCABULARY_TENSORS, open_checkpoint, with_mask_embedding
from megatron.config.shape import Shape
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full
from tests.convert.reference import make_config, random_tensors


@pytest.mark.parametrize("untied", [False, True])
def test_only_the_mask_row_changes(untied: bool) -> None:
    tensors = random_tensors(make_config(untie_embeddings_and_output_weights=untied).model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = with_mask_embedding(tensors, vocab_size=300, mask_id=300)
    mean = tensors["word_embeddings.weight"][:300].mean(0)
    assert torch.allclose(out["word_embeddings.weight"][300], mean, atol=1e-7)
    others = torch.arange(384) != 300
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor), "the input must not change"
        if name in ("word_embeddings.weight", "lm_head.weight"):
            assert torch.equal(out[name][others], tensor[others])
        else:
            assert torch.equal(out[name], tensor)
    if untied:
        assert torch.allclose(out["lm_head.weight"][300], tensors["lm_head.weight"][300:].mean(0), atol=1e-6)


def test_mask_token_inside_the_vocabulary_is_not_part_of_the_mean() -> None:
    tensors = random_tensors(make_config().model)
    out = with_mask_embedding(tensors, vocab_size=300, mask_id=17)
    rest = torch.arange(300) != 17
    assert torch.allclose(
        out["word_embeddings.weight"][17], tensors["word_embeddings.weight"][:300][rest].mean(0), atol=1e-7
    )


def test_rows_are_added_where_the_mask_token_has_none() -> None:
    """An imported model of 300 rows and 300 tokens has no room for a mask token."""
    config = make_config(rows=300, untie_embeddings_and_output_weights=True)
    tensors = random_tensors(config.model)
    for rows in (None, 384):
        out = with_mask_embedding(tensors, vocab_size=300, mask_id=300, padded_vocab_size=rows)
        assert out["word_embeddings.weight"].shape == (rows or 301, 48)
        assert out["lm_head.weight"].shape == (rows or 301, 48)
        assert torch.equal(out["word_embeddings.weight"][:300], tensors["word_embeddings.weight"])
    ids = torch.randint(0, 300, (1, 32))
    small = GPTModel(Shape.of(config.model))
    load_tensors(small, tensors)
    large = GPTModel(Shape.of(replace(config.model, padded_vocab_size=384)))
    load_tensors(large, out)
    assert torch.allclose(
        small.eval().logits(Inputs(ids), Causal()), large.eval().logits(Inputs(ids), Causal())[..., :300], atol=1e-6
    )


@pytest.mark.parametrize(
    "arguments", [{"vocab_size": 385, "mask_id": 1}, {"vocab_size": 300, "mask_id": 400, "padded_vocab_size": 384}]
)
def test_what_does_not_fit_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="the rows must hold the vocabulary and the mask token"):
        with_mask_embedding(random_tensors(make_config().model), **arguments)


def test_masked_input_starts_closer_than_an_untrained_row() -> None:
    """Of all tokens, the mean is nearest on average: so a masked position looks least unlike what the model knows."""
    tensors = random_tensors(make_config().model)
    embedding = tensors["word_embeddings.weight"][:300]
    out = with_mask_embedding(tensors, vocab_size=300, mask_id=300)["word_embeddings.weight"]

    def distance(row: torch.Tensor) -> float:
        return float(((embedding - row) ** 2).sum(-1).mean())

    assert distance(out[300]) < distance(tensors["word_embeddings.weight"][300])
    model = GPTModel(Shape.of(make_config("mdm").model))
    load_tensors(model, with_mask_embedding(tensors, vocab_size=300, mask_id=300))
    assert torch.isfinite(model.logits(Inputs(torch.full((1, 32), 300)), Full())).all()


@pytest.mark.parametrize("untied", [False, True])
def test_a_run_reads_the_mask_embedding_in_any_layout(tmp_path: Path, untied: bool) -> None:
    """Vocabulary tensors with more rows than were saved, all others as they were saved."""
    config = make_config(untie_embeddings_and_output_weights=untied)
    tensors = random_tensors(config.model)
    tag = save_full_checkpoint(tmp_path, config, tensors)
    masked = replace(
        config,
        model=replace(config.model, padded_vocab_size=512),
        objective=replace(config.objective, mask_token_id=400),
        run=replace(config.run, finetune=True),
    )
    reader = open_checkpoint(tag, masked, vocab_size=300)
    expected = with_mask_embedding(tensors, vocab_size=300, mask_id=400, padded_vocab_size=512)
    for name, tensor in expected.items():
        spec = reader.specs[name]
        assert spec.full_shape == tuple(tensor.shape)
        for rank in range(2):
            part = spec.shard(tensor, rank, 2).reshape(-1)
            fragment = Fragment("weight", name, rank if spec.dim is not None else 0, 2, 3, torch.zeros(len(part) - 3))
            reader.read(fragment)
            assert torch.equal(fragment.data, part[3:])
    assert set(reader.replaced) == {name for name in VOCABULARY_TENSORS if name in tensors}
    assert not open_checkpoint(tag, replace(masked, run=config.run), vocab_size=300).replaced, "a continued run"
