"""Kinds of loss: a scalar for training and a number per token for evaluation, which must agree."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model.batch import Targets
from megatron.model.loss import HeadOutput, WeightedCrossEntropy
from megatron.parallel.context import ParallelContext

HIDDEN, VOCAB = 16, 37
KIND = WeightedCrossEntropy()


@pytest.fixture
def targets() -> Targets[torch.Tensor]:
    """[3, 4] positions; the middle sample has none in the loss, as a draw with few masks may; the last lacks a token."""
    weights = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 0.5, 0, 3]])
    labels = torch.randint(VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))
    return Targets(labels, weights, weights.flatten().nonzero().flatten(), torch.tensor([4.0, 4.0, 3.0]))


@pytest.fixture
def output() -> HeadOutput:
    random = torch.Generator().manual_seed(0)
    hidden, matrix = (torch.randn(*shape, generator=random) for shape in ((3, 4, HIDDEN), (VOCAB, HIDDEN)))
    return HeadOutput(hidden.requires_grad_(), matrix.requires_grad_())


def cross_entropy(output: HeadOutput, targets: Targets[torch.Tensor]) -> torch.Tensor:
    logits = (output.hidden @ output.matrix.T).detach().flatten(0, 1)
    return F.cross_entropy(logits, targets.labels.flatten(), reduction="none").view(3, 4)


def test_only_weighted_positions_enter_the_loss(output, targets):
    loss = KIND.reduce(output, targets, ParallelContext())
    loss.backward()
    expected = (cross_entropy(output, targets) * targets.loss_weights).sum() / 11
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(output.hidden.grad.abs().sum(-1) > 0, targets.loss_weights > 0)


def test_token_losses_add_up_to_the_loss(output, targets):
    losses = KIND.per_token(output, targets, ParallelContext())
    torch.testing.assert_close(losses, cross_entropy(output, targets) * targets.loss_weights)
    loss = KIND.reduce(output, targets, ParallelContext())
    torch.testing.assert_close(losses.sum() / targets.num_tokens.sum(), loss.detach())


def test_one_token_counts_as_one(output, targets):
    one = Targets(targets.labels, torch.eye(3, 4) * torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([0]),
                  torch.tensor([1.0, 0.0, 0.0]))  # fmt: skip
    loss = KIND.reduce(output, one, ParallelContext())
    assert loss.item() == pytest.approx(cross_entropy(output, targets)[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize("num_tokens", [4.0, 0.0])
def test_a_batch_with_nothing_in_the_loss(output, targets, num_tokens):
    """Also one whose tokens all end a document under --eod-mask-loss."""
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Targets(targets.labels, torch.zeros(3, 4), nothing, torch.full((3,), num_tokens))
    loss = KIND.reduce(output, empty, ParallelContext())
    loss.backward()
    assert loss.item() == 0.0 and output.hidden.grad.abs().sum() == 0
    assert not KIND.per_token(output, empty, ParallelContext()).any()
