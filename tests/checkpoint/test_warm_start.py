"""AR -> MDM: the mask embedding."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.tensors import save_full_checkpoint
from megatron.checkpoint.warm_start import MaskedReader, open_checkpoint
from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full
from megatron.parallel.context import ParallelContext
from tests.convert.reference import make_config, random_tensors


def masked(
    folder: Path, tensors: dict[str, torch.Tensor], config: Config, *, mask_id: int, rows: int, vocab_size: int = 300
) -> dict[str, torch.Tensor]:
    """Whole tensors of an AR model, as a run of masked diffusion reads them that has so many rows."""
    reader = open_checkpoint(
        save_full_checkpoint(folder, config, tensors),
        replace(
            config,
            model=replace(config.model, padded_vocab_size=rows),
            objective=replace(config.objective, mask_token_id=mask_id),
            run=replace(config.run, finetune=True),
        ),
        ParallelContext(),
        vocab_size=vocab_size,
    )
    assert isinstance(reader, MaskedReader)
    found = {name: torch.full(spec.full_shape, torch.nan) for name, spec in reader.specs.items()}
    for name, tensor in found.items():
        reader.read(Fragment("weight", name, 0, 1, 0, tensor.view(-1)))
    return found


@pytest.mark.parametrize("untied", [False, True])
def test_only_the_mask_row_changes(tmp_path: Path, untied: bool) -> None:
    config = make_config(untie_embeddings_and_output_weights=untied)
    tensors = random_tensors(config.model)
    out = masked(tmp_path, tensors, config, mask_id=300, rows=384)
    mean = tensors["word_embeddings.weight"][:300].mean(0)
    assert torch.allclose(out["word_embeddings.weight"][300], mean, atol=1e-7)
    others = torch.arange(384) != 300
    for name, tensor in tensors.items():
        if name in ("word_embeddings.weight", "lm_head.weight"):
            assert torch.equal(out[name][others], tensor[others])
        else:
            assert torch.equal(out[name], tensor)
    if untied:
        assert torch.allclose(out["lm_head.weight"][300], tensors["lm_head.weight"][300:].mean(0), atol=1e-6)


def test_mask_token_inside_the_vocabulary_is_not_part_of_the_mean(tmp_path: Path) -> None:
    config = make_config(untie_embeddings_and_output_weights=True)
    tensors = random_tensors(config.model)
    out = masked(tmp_path, tensors, config, mask_id=17, rows=384)
    assert torch.equal(out["lm_head.weight"], tensors["lm_head.weight"])
    rest = torch.arange(300) != 17
    assert torch.allclose(
        out["word_embeddings.weight"][17], tensors["word_embeddings.weight"][:300][rest].mean(0), atol=1e-7
    )


def test_rows_are_added_where_the_mask_token_has_none(tmp_path: Path) -> None:
    """An imported model of 300 rows and 300 tokens has no room for a mask token."""
    config = make_config(rows=300, untie_embeddings_and_output_weights=True)
    tensors = random_tensors(config.model)
    for rows in (301, 384):
        out = masked(tmp_path / str(rows), tensors, config, mask_id=300, rows=rows)
        assert out["word_embeddings.weight"].shape == out["lm_head.weight"].shape == (rows, 48)
        assert not out["lm_head.weight"][300:].any() and len(out["word_embeddings.weight"][300:].unique(dim=0)) == 1
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
    "arguments",
    [{"vocab_size": 385, "mask_id": 1, "rows": 512}, {"mask_id": 400, "rows": 384}, {"mask_id": 1, "rows": 256}],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    config = make_config()
    with pytest.raises(UserError, match="the rows must hold the vocabulary and the mask token"):
        masked(tmp_path, random_tensors(config.model), config, **arguments)


def test_masked_input_starts_closer_than_an_untrained_row(tmp_path: Path) -> None:
    """Of all tokens, the mean is nearest on average: so a masked position looks least unlike what the model knows."""
    config = make_config()
    tensors = random_tensors(config.model)
    embedding = tensors["word_embeddings.weight"][:300]
    found = masked(tmp_path, tensors, config, mask_id=300, rows=384)
    out = found["word_embeddings.weight"]

    def distance(row: torch.Tensor) -> float:
        return float(((embedding - row) ** 2).sum(-1).mean())

    assert distance(out[300]) < distance(tensors["word_embeddings.weight"][300])
    model = GPTModel(Shape.of(make_config("mdm").model))
    load_tensors(model, found)
    assert torch.isfinite(model.logits(Inputs(torch.full((1, 32), 300)), Full())).all()


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("mask_id", "rows"), [(400, 512), (17, 384), (383, 384)])
def test_any_fragment_is_a_part_of_the_whole(tmp_path: Path, untied: bool, mask_id: int, rows: int) -> None:
    """Of every layout: shards of the vocabulary, and ranges of them that begin and end within a row."""
    config = make_config(untie_embeddings_and_output_weights=untied)
    tensors = random_tensors(config.model)
    whole = masked(tmp_path, tensors, config, mask_id=mask_id, rows=rows)
    reader = MaskedReader(tmp_path / "global_step0", "weight", ParallelContext(), size=300, mask_id=mask_id, rows=rows)
    for name, tensor in whole.items():
        spec = reader.specs[name]
        assert spec.full_shape == tuple(tensor.shape)
        for rank in range(2):
            part = spec.shard(tensor, rank, 2).reshape(-1)
            cuts = sorted({3, len(part) // 3, len(part) - 50, len(part)} & set(range(3, len(part) + 1)))
            for first, last in pairwise(cuts):
                data = torch.full((last - first,), torch.nan)
                reader.read(Fragment("weight", name, rank if spec.dim is not None else 0, 2, first, data))
                assert torch.equal(data, part[first:last])


def test_a_continued_run_reads_what_was_saved(tmp_path: Path) -> None:
    config = make_config()
    tag = save_full_checkpoint(tmp_path, config, random_tensors(config.model))
    continued = replace(config, objective=replace(config.objective, mask_token_id=300))
    assert not isinstance(open_checkpoint(tag, continued, ParallelContext(), vocab_size=300), MaskedReader)
