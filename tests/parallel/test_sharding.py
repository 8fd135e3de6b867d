"""Splitting and joining tensors, and layout-free initial weights."""

import itertools

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model.gpt import GPTModel
from megatron.parallel.context import Axis, ParallelContext
from megatron.parallel.sharding import ShardSpec, initial_shard, shard_of
from megatron.parallel.tensor import ParameterFactory
from megatron.randomness import named_seed

SPECS = [
    ShardSpec((8, 3), 0, (8,)),
    ShardSpec((3, 8), 1, (8,)),
    ShardSpec((16, 3), 0, (8, 4, 4)),  # [Q; K; V] with fewer key heads
    ShardSpec((24,), 0, (12, 12)),  # a bias of [gate; up]
    ShardSpec((5, 3)),
]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.full_shape}-{spec.dim}")
def test_combine_is_the_inverse_of_shard(spec, tp_size):
    full = torch.arange(torch.Size(spec.full_shape).numel(), dtype=torch.float32).view(spec.full_shape)
    shards = [spec.shard(full, rank, tp_size) for rank in range(tp_size)]
    assert all(tuple(shard.shape) == spec.local_shape(tp_size) for shard in shards)
    assert torch.equal(spec.combine(shards), full)


@pytest.mark.parametrize(
    "spec", [*SPECS, ShardSpec((2, 8, 3), 1, (4, 4))], ids=lambda spec: f"{spec.full_shape}-{spec.dim}"
)
def test_a_range_of_a_shard_is_found_in_those_of_another_split_once(spec):
    full = torch.arange(torch.Size(spec.full_shape).numel()).view(spec.full_shape)
    for tp_size, saved_size in itertools.product((1, 2, 4), repeat=2):
        saved = [spec.shard(full, rank, saved_size).reshape(-1) for rank in range(saved_size)]
        for rank in range(tp_size):
            shard = spec.shard(full, rank, tp_size).reshape(-1)
            for first, last in itertools.combinations(range(0, len(shard) + 1, 2), 2):
                found = torch.full_like(shard, -1)
                for part in spec.rectangles(rank, tp_size, first, last, saved_size=saved_size):
                    source = saved[part.rank] if spec.dim is not None else saved[0]
                    for row in range(part.rows):
                        here, there = part.start + row * part.stride, part.source_start + row * part.source_stride
                        assert (found[here : here + part.width] == -1).all()
                        found[here : here + part.width] = source[there : there + part.width]
                assert torch.equal(found[first:last], shard[first:last])
                assert (found[:first] == -1).all() and (found[last:] == -1).all()


def test_stacked_matrices_are_each_split():
    full = torch.arange(8.0)
    spec = ShardSpec((8,), 0, (4, 2, 2))
    assert spec.shard(full, 0, 2).tolist() == [0, 1, 4, 6]
    assert spec.shard(full, 1, 2).tolist() == [2, 3, 5, 7]


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\).*expects \(8, 3\)"):
        SPECS[0].shard(torch.zeros(4, 3), 0, 2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.full_shape}-{spec.dim}")
def test_initial_weights_do_not_depend_on_the_layout(spec):
    def shards(tp_size: int) -> list[torch.Tensor]:
        options = {"name": "layers.0.x", "std": 0.02, "seed": 1, "tp_size": tp_size}
        return [initial_shard(spec, tp_rank=rank, **options) for rank in range(tp_size)]

    assert torch.equal(spec.combine(shards(2)), shards(1)[0])


def test_initial_weights_differ_by_name_and_run():
    drawn = [initial_shard(SPECS[0], name=name, std=1.0, seed=seed, tp_rank=0, tp_size=1).sum().item()
             for name, seed in (("a", 1), ("b", 1), ("a", 2))]  # fmt: skip
    assert len(set(drawn)) == 3


def test_seeds_differ_by_name_and_run():
    seeds = {named_seed(seed, name) for seed in (1, 2, 12) for name in ("a", "b", "2:a")}
    assert len(seeds) == 9 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("swiglu", [True, False])
def test_every_tensor_of_a_model_is_split_as_its_spec_says(swiglu):
    config = Shape.of(
        ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            num_query_groups=2,
            seq_length=8,
            swiglu=swiglu,
            padded_vocab_size=32,
            disable_bias_linear=False,
            ffn_hidden_size=24,
            untie_embeddings_and_output_weights=True,
            use_rotary_position_embeddings=False,
        )
    )
    whole = GPTModel(config, ParameterFactory(seed=7)).tensors()
    parts = [GPTModel(config, ParameterFactory(ParallelContext(tp=Axis(rank, 2)), seed=7)) for rank in range(2)]
    specs = {shard.name: shard.spec for shard in map(shard_of, parts[0].parameters())}
    assert set(specs) == set(whole)
    states = [part.tensors() for part in parts]
    for name, spec in specs.items():
        assert torch.equal(spec.combine([state[name] for state in states]), whole[name]), name
