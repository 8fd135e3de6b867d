"""The chunked head and loss against F.cross_entropy over all logits."""

import pytest
import torch
import torch.nn.functional as F

from megatron.parallel import cross_entropy
from megatron.parallel.context import ParallelContext
from megatron.parallel.cross_entropy import linear_cross_entropy

HIDDEN, VOCAB = 16, 37


def make_inputs(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=random).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (rows,), generator=random)
    return hidden, weight, labels, torch.rand(rows, generator=random) * 5


def reference(hidden, weight, labels, loss_weights) -> tuple[torch.Tensor, ...]:
    """loss, ce, both gradients (of three times the loss), all fp32."""
    hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    ce = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    loss = (ce * loss_weights).sum()
    (3 * loss).backward()
    return loss.detach(), ce.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 23])  # below, at and past the boundaries of chunks of 8
def test_values_and_gradients(monkeypatch, rows, device):
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, device, 8)
    inputs = tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in make_inputs(rows))
    loss, ce = linear_cross_entropy(*inputs, ParallelContext())
    (3 * loss).backward()
    for got, wanted in zip((loss.detach(), ce, inputs[0].grad, inputs[1].grad), reference(*inputs)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not ce.requires_grad


def test_no_rows_give_zero_and_zero_gradients():
    hidden, weight, labels, loss_weights = make_inputs(0)
    loss, ce = linear_cross_entropy(hidden, weight, labels, loss_weights, ParallelContext())
    loss.backward()
    assert loss.item() == 0.0 and ce.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN) and torch.equal(weight.grad, torch.zeros(VOCAB, HIDDEN))


def test_a_row_of_weight_zero_has_no_gradient():
    hidden, weight, labels, loss_weights = make_inputs(6)
    loss_weights[2] = 0.0
    linear_cross_entropy(hidden, weight, labels, loss_weights, ParallelContext())[0].backward()
    assert torch.equal(hidden.grad[2], torch.zeros(HIDDEN)) and hidden.grad[3].abs().sum() > 0


def test_bf16_inputs_stay_close_and_give_bf16_gradients():
    inputs = make_inputs(50, torch.bfloat16)
    loss, ce = linear_cross_entropy(*inputs, ParallelContext())
    (3 * loss).backward()
    assert loss.dtype == ce.dtype == torch.float32 and inputs[1].grad.dtype == torch.bfloat16
    wanted = reference(*inputs)
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(ce, wanted[1], rtol=0, atol=0.06)  # logits near 10 in bf16 are rounded by 0.03
    for got, exact in zip((inputs[0].grad, inputs[1].grad), wanted[2:]):
        assert (got.float() - exact).norm() / exact.norm() < 0.01


def test_extreme_logits_stay_finite():
    hidden, weight, labels, loss_weights = make_inputs(9)
    with torch.no_grad():
        hidden *= 1e4
    loss, ce = linear_cross_entropy(hidden, weight, labels, loss_weights, ParallelContext())
    loss.backward()
    assert torch.isfinite(ce).all() and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_without_gradients_the_values_are_the_same():
    inputs = make_inputs(11)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(*inputs, ParallelContext())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*inputs)[0])


def test_two_losses_on_one_graph_add_their_gradients():
    """The weight is tied and used once per micro-batch: a buffer scaled in place must not leak into the other call."""
    hidden, weight, labels, loss_weights = make_inputs(5)
    first, _ = linear_cross_entropy(hidden, weight, labels, loss_weights, ParallelContext())
    second, _ = linear_cross_entropy(hidden, weight, labels, loss_weights, ParallelContext())
    (first + 2 * second).backward()
    torch.testing.assert_close(weight.grad, reference(hidden, weight, labels, loss_weights)[3], rtol=1e-5, atol=1e-5)
