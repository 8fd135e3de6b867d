"""Each layer against its formula in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain_transformer import attention, causal, plain_logits, rms_norm, rotate_complex

from megatron.config.schema import ModelConfig
from megatron.config.shape import PRESETS, Shape, swiglu_width
from megatron.model.arithmetic import model_flops_per_token, parameters_for_compute
from megatron.model.attention import RotaryEmbedding, SelfAttention, apply_rotary
from megatron.model.batch import Inputs, Stream
from megatron.model.block import MLP, Norm
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full, RandomKeyDrop
from megatron.model.visibility import visible_keys
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory
from megatron.scaling.literature import preset_parameters


def make_config(**changes) -> ModelConfig:
    values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "padded_vocab_size": 48,
              "attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": 0.3, "ffn_hidden_size": 40}  # fmt: skip
    return Shape.of(ModelConfig(**{**values, **changes}))


@pytest.fixture
def factory() -> ParameterFactory:
    return ParameterFactory(ParallelContext(), seed=3, prefix="layer")


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary_is_a_complex_rotation(base):
    x = torch.randn(2, 3, 9, 8)
    rotary = RotaryEmbedding(channels=8, length=4, base=base)  # shorter than the input: it must grow
    turned = apply_rotary(x, *rotary(9, None))
    torch.testing.assert_close(turned, rotate_complex(x, torch.arange(9).expand(2, 9), base))
    assert rotary.state_dict() == {}


def test_rotary_takes_each_tokens_own_position():
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 3, 1, 7, 2], [5, 5, 0, 1, 6]])
    turned = apply_rotary(x, *RotaryEmbedding(channels=8, length=8, base=10000.0)(5, positions))
    torch.testing.assert_close(turned, rotate_complex(x, positions))


def test_rotary_stays_exact_in_bf16_far_out():
    rotary = RotaryEmbedding(channels=8, length=4097, base=10000.0).bfloat16()
    cos, _ = rotary(4097, None)
    assert cos.dtype == torch.float32
    assert cos[4096, 0].item() == pytest.approx(math.cos(4096.0), abs=1e-6)


def test_rms_norm_and_layer_norm(factory):
    x = torch.randn(2, 5, 32) * 3 + 1
    rms = Norm(make_config(), factory)
    torch.nn.init.uniform_(rms.weight)
    torch.testing.assert_close(rms(x), rms_norm(x, rms.weight))
    layer = Norm(make_config(normalization="layernorm"), factory)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(layer(x), (x - mean) / torch.sqrt(var + 1e-5) * layer.weight + layer.bias)


def test_mlp_swiglu_and_gelu(factory):
    x = torch.randn(2, 5, 32)
    mlp = MLP(make_config(), factory)
    gate, up = (x @ mlp.dense_h_to_4h.weight.T).chunk(2, -1)
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.dense_4h_to_h.weight.T)
    mlp = MLP(make_config(swiglu=False, disable_bias_linear=False), factory)
    for layer in (mlp.dense_h_to_4h, mlp.dense_4h_to_h):
        torch.nn.init.uniform_(layer.bias)
    inner = x @ mlp.dense_h_to_4h.weight.T + mlp.dense_h_to_4h.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), gelu @ mlp.dense_4h_to_h.weight.T + mlp.dense_4h_to_h.bias)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", [Causal(), Full(), RandomKeyDrop(0.7, seed=1)])
@pytest.mark.parametrize("kv_channels", [8, 12])  # 4 heads of 12 channels are not the hidden size
def test_attention(factory, groups, mask, kv_channels):
    config = make_config(num_query_groups=groups, kv_channels=kv_channels)
    layer = SelfAttention(config, factory, RotaryEmbedding.of(config))
    x, positions, sample_ids = torch.randn(2, 16, 32), torch.arange(16).expand(2, 16), torch.tensor([4, 9])
    qkv = (x @ layer.query_key_value.weight.T).view(2, 16, 4 + 2 * groups, kv_channels).transpose(1, 2)
    query, key, value = qkv.split((4, groups, groups), dim=1)
    if isinstance(mask, RandomKeyDrop):
        allowed = visible_keys(mask, Stream(x, sample_ids=sample_ids))
    else:
        allowed = causal(16) if isinstance(mask, Causal) else None
    expected = attention(rotate_complex(query, positions), rotate_complex(key, positions), value, allowed)
    expected = expected.transpose(1, 2).reshape(2, 16, -1) @ layer.dense.weight.T
    torch.testing.assert_close(
        layer(x, layer.visible(Stream(x, sample_ids=sample_ids), mask)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"num_query_groups": 2}, {"untie_embeddings_and_output_weights": True}])
@pytest.mark.parametrize("mask", [Causal(), Full()])
def test_whole_model(changes, mask):
    config = make_config(**changes)
    model = GPTModel(config, ParameterFactory(seed=5))
    ids = torch.randint(48, (2, 16))
    allowed = causal(16) if isinstance(mask, Causal) else None
    expected = plain_logits(model.tensors(), ids, config, allowed=allowed)
    torch.testing.assert_close(model.logits(Inputs(ids), mask), expected, rtol=1e-4, atol=1e-4)


def test_learned_positions_follow_their_tokens():
    model = GPTModel(make_config(use_rotary_position_embeddings=False), ParameterFactory(seed=5))
    ids, order = torch.randint(48, (1, 16)), torch.randperm(16)[None]
    direct = model.logits(Inputs(ids), Full())
    moved = model.logits(Inputs(ids.gather(1, order), order), Full())
    torch.testing.assert_close(moved, direct[:, order[0]], rtol=1e-4, atol=1e-4)
    last = torch.full((1, 16), 16)  # of an order over seq + 1 tokens, which may come before others
    assert model.logits(Inputs(ids, last), Full()).isfinite().all()


def test_causal_logits_do_not_depend_on_later_tokens():
    model = GPTModel(make_config(), ParameterFactory(seed=5))
    ids = torch.randint(48, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 48
    before, after = (model.logits(Inputs(tokens), Causal()) for tokens in (ids, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-4  # and do depend on earlier ones


def test_recomputation_changes_nothing():
    ids = torch.randint(48, (2, 16))
    grads = []
    for recompute in (False, True):
        model, passes = GPTModel(make_config(), ParameterFactory(seed=5), recompute=recompute), []
        model.layers[0].input_layernorm.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        F.cross_entropy(model.logits(Inputs(ids), Causal()).flatten(0, 1), ids.flatten()).backward()
        assert len(passes) == 1 + recompute
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


def test_initial_weights_have_the_stated_spread():
    config = make_config(hidden_size=256, num_attention_heads=4, num_layers=8, padded_vocab_size=1024,
                         init_method_std=0.02, ffn_hidden_size=640)  # fmt: skip
    state = GPTModel(config, ParameterFactory(seed=5)).tensors()
    scaled = 0.02 / math.sqrt(2 * 8)
    for name, std in {"word_embeddings.weight": 0.02, "layers.3.self_attention.query_key_value.weight": 0.02,
                      "layers.3.mlp.dense_h_to_4h.weight": 0.02, "layers.3.self_attention.dense.weight": scaled,
                      "layers.3.mlp.dense_4h_to_h.weight": scaled}.items():  # fmt: skip
        assert state[name].std().item() == pytest.approx(std, rel=0.02), name
    assert torch.equal(state["final_layernorm.weight"], torch.ones(256))
    assert not torch.equal(state["layers.0.mlp.dense_4h_to_h.weight"], state["layers.1.mlp.dense_4h_to_h.weight"])


@pytest.mark.parametrize("name", ["7M", "20M", "140M"])  # 20M: 7 heads of 32 channels on 288 channels
def test_parameter_counts_of_presets(name):
    preset = PRESETS[name]
    config = Shape.of(ModelConfig(model=name, padded_vocab_size=50304))
    with torch.device("meta"):
        model = GPTModel(config)
    hidden, layers, ffn = preset.hidden_size, preset.num_layers, swiglu_width(preset.hidden_size)
    attention_size = preset.num_attention_heads * preset.kv_channels
    per_layer = 4 * hidden * attention_size + 3 * hidden * ffn + 2 * hidden
    assert sum(p.numel() for p in model.parameters()) == layers * per_layer + 50304 * hidden + hidden
    # The paper's formula, FACTS §1, takes heads·kv = hidden and counts six vectors a layer.
    expected = layers * (4 * hidden**2 + 3 * hidden * ffn + 6 * hidden) + 50257 * hidden
    assert parameters_for_compute(config, 50257) == preset_parameters(name) == expected


@pytest.mark.parametrize(
    "more",
    [{"num_query_groups": 2}, {"swiglu": False}, {"num_query_groups": 4, "swiglu": False, "ffn_hidden_size": 500}],
)
def test_parameters_for_compute_are_the_matrices_that_there_are(more):
    """Grouped queries and GELU have fewer than the paper's models: GPT-2 small was counted with 152M parameters of its 124M."""
    sizes = {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 8, **more}
    shape = Shape.from_flags(ModelConfig(**sizes), padded_vocab_size=128)
    parameters = GPTModel(shape, ParameterFactory.of_shapes()).named_parameters()
    matrices = sum(p.numel() for name, p in parameters if name.startswith("layers.") and p.dim() == 2)
    assert parameters_for_compute(shape, 100) == matrices + 3 * 6 * 96 + 100 * 96


@pytest.mark.parametrize("changes", [{}, {"swiglu": False}, {"num_query_groups": 2}, {"kv_channels": 12}], ids=str)
def test_flops_count_every_matrix_of_the_model(changes):
    shape = make_config(**changes)
    matrices = sum(p.numel() for p in GPTModel(shape, ParameterFactory()).parameters() if p.dim() == 2)
    attention = 12 * 2 * 4 * shape.kv_channels * 16
    assert model_flops_per_token(shape, mask=Full(), loss_fraction=1.0) == 6 * matrices + attention


def test_published_sizes():
    assert preset_parameters("140M") == 15 * (4 * 768**2 + 3 * 768 * 2048 + 6 * 768) + 50257 * 768
    assert preset_parameters("7M") / 1e6 == pytest.approx(7.0, rel=0.03)
    assert swiglu_width(64) == 128 and swiglu_width(128) == 320 and swiglu_width(1280) == 3392
