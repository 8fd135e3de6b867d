"""The checkpoint of the reference implementation (FACTS §5), put into this model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_transformer import causal, plain_logits

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.data.loader import as_tensors
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs, Samples
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full
from megatron.objectives.ar import Autoregressive
from megatron.objectives.mdm import MaskedDiffusion

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = Shape.of(
    ModelConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=16,
        seq_length=64,
        padded_vocab_size=50304,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Tensors by canonical name; the layer files hold plain tensors only."""
    folder = GOLDEN / "ar_ckpt" / (GOLDEN / "ar_ckpt" / "latest").read_text().strip()

    def layer(index: int) -> dict[str, torch.Tensor]:
        return torch.load(folder / f"layer_{index:02d}-model_00-model_states.pt", weights_only=True, map_location="cpu")

    named = dict(layer(1))
    for index in range(3):
        named |= {f"layers.{index}.{name}": tensor for name, tensor in layer(index + 2).items()}
    named["final_layernorm.weight"] = layer(5)["weight"]
    return named


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[2, 65] real samples of the golden data."""
    samples = np.load(GOLDEN / "data" / "case0_golden_n300_train.npz")
    name = next(key for key in samples.files if samples[key].ndim == 2 and samples[key].shape[1] == 65)
    return torch.from_numpy(samples[name][:2].astype(np.int64))


def load(weights: dict[str, torch.Tensor]) -> GPTModel:
    model = GPTModel(CONFIG)
    load_tensors(model, weights)  # strict: every tensor has its place and its shape
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("mask", [Causal(), Full()])
def test_logits_equal_plain_torch(weights, tokens, mask):
    allowed = causal(64) if isinstance(mask, Causal) else None
    logits = load(weights).logits(Inputs(tokens[:, :-1]), mask)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(
        logits, plain_logits(weights, tokens[:, :-1], CONFIG, allowed=allowed), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_ar_loss_equals_plain_torch(weights, tokens):
    objective = Autoregressive()
    batch = as_tensors(objective.prepare(Samples(tokens.numpy(), np.arange(2))))
    loss = load(weights)(batch, Causal(), objective.loss).item()
    logits = plain_logits(weights, tokens[:, :-1], CONFIG, allowed=causal(64))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(expected, abs=1e-5)
    assert loss < 10.5  # it was trained: below the ln(50304) = 10.83 of a uniform guess


@torch.no_grad()
def test_mdm_loss_equals_plain_torch(weights, tokens):
    objective = MaskedDiffusion(mask_token_id=50257, global_batch_size=2, seed=1)
    batch = as_tensors(objective.prepare(Samples(tokens.numpy(), np.arange(2))))
    loss = load(weights)(batch, Full(), objective.loss).item()
    logits = plain_logits(weights, batch.inputs.input_ids, CONFIG)
    ce = F.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten(), reduction="none").view(2, 64)
    is_masked = batch.inputs.input_ids == 50257
    p = 1 / batch.targets.loss_weights.amax(-1, keepdim=True)
    assert loss == pytest.approx(((ce / p) * is_masked).sum().item() / 128, abs=1e-5)


@torch.no_grad()
def test_causal_and_full_attention_differ_where_they_should(weights, tokens):
    model, inputs = load(weights), Inputs(tokens[:, :-1])
    causal_logits, full_logits = model.logits(inputs, Causal()), model.logits(inputs, Full())
    difference = (causal_logits - full_logits).abs().amax(-1)
    assert difference[:, 0].min() > 1e-3  # the first token sees nothing else, or everything
