"""Names and shapes of a model, and checkpoints that claim others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.files import read_manifest, write_manifest
from megatron.checkpoint.tensors import full_shapes, model_tensors, open_whole_model, save_full_checkpoint
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.model.gpt import GPTModel
from tests.convert.reference import make_config, random_tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2, "untie_embeddings_and_output_weights": True},
        {"normalization": "layernorm", "swiglu": False, "disable_bias_linear": False},
        {"use_rotary_position_embeddings": False, "kv_channels": 16},
    ],
)
def test_names_and_shapes_are_those_of_the_model(changes: dict) -> None:
    config = make_config(**changes)
    expected = {name: tuple(tensor.shape) for name, tensor in GPTModel(Shape.of(config.model)).tensors().items()}
    assert full_shapes(model_tensors(config.model, num_tensors=100, source="test")) == expected


def test_whole_tensors_come_back(tmp_path: Path) -> None:
    config = make_config()
    tensors = random_tensors(config.model)
    reader = open_whole_model(save_full_checkpoint(tmp_path, config, tensors, step=7))
    assert set(reader.specs) == set(tensors)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("final_layernorm.weight"), "missing final_layernorm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown extra"),
        (lambda t: t.update({"final_layernorm.weight": torch.ones(3)}), r"is \[3\], expected \[48\]"),
        (lambda t: t.update({"final_layernorm.weight": torch.ones(48).long()}), "is torch.int64"),
        (lambda t: t["final_layernorm.weight"].fill_(float("nan")), "NaN or infinite values in final_layernorm"),
    ],
)
def test_other_tensors_are_refused_and_nothing_is_written(tmp_path: Path, change, message: str) -> None:
    config = make_config()
    tensors = random_tensors(config.model)
    change(tensors)
    with pytest.raises(UserError, match=message):
        save_full_checkpoint(tmp_path / "run", config, tensors)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_claims_another_model_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """Its manifest is sealed and its files are right: only its sizes are not."""
    config = make_config()
    tag = save_full_checkpoint(tmp_path, config, random_tensors(config.model))
    manifest = read_manifest(tag)
    for sizes in ({"num_layers": 10**10}, {"hidden_size": 10**15}, {"num_layers": 3}, {"ffn_hidden_size": 10**6}):
        model = {**manifest["config"]["model"], **sizes}
        write_manifest(tag, {**manifest, "config": {**manifest["config"], "model": model}})
        with pytest.raises(UserError, match=r"num_layers 10000000000|hidden_size 1000000000000000|missing|wrong shape"):
            open_whole_model(tag)
    tensors = {**manifest["tensors"], "final_layernorm.weight": {"shape": [10**13], "dim": None, "blocks": []}}
    write_manifest(tag, {**manifest, "tensors": tensors})
    with pytest.raises(UserError, match=r"wrong shape: final_layernorm.weight"):
        open_whole_model(tag)
    other = replace(config.model, padded_vocab_size=512)
    assert full_shapes(model_tensors(other, num_tensors=100, source="test"))["word_embeddings.weight"] == (512, 48)


def test_a_tensor_that_its_shards_do_not_hold_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    from megatron.checkpoint.reader import CheckpointReader

    config = make_config()
    tag = save_full_checkpoint(tmp_path, config, random_tensors(config.model))
    manifest = read_manifest(tag)
    tensors = {**manifest["tensors"], "final_layernorm.weight": {"shape": [10**13], "dim": None, "blocks": []}}
    write_manifest(tag, {**manifest, "tensors": tensors})
    with pytest.raises(UserError, match="has 48 of 10000000000000 elements"):
        CheckpointReader(tag).tensor("final_layernorm.weight")
