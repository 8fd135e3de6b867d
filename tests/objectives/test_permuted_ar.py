"""AR over permuted token orders."""

import numpy as np
import pytest
import torch
from objective_helpers import SEQ, assert_same_batch, make_objective, make_tokens, prepare, tiny_model

from megatron.model.mask import Causal
from megatron.objectives.permuted_ar import PermutedAR

FLAGS = {"uniform": ["--num-order-list", "6"], "predefined": ["--num-order-list", "6", "--use-predefined-order"]}


@pytest.fixture(params=FLAGS)
def objective(request) -> PermutedAR:
    built = make_objective(*FLAGS[request.param], objective="ar")
    assert isinstance(built, PermutedAR)
    return built


def test_orders_are_permutations_that_keep_position_zero(objective):
    for index in range(6):
        order = objective.order(index, SEQ + 1)
        assert sorted(order) == list(range(SEQ + 1)) and order[0] == 0
    assert np.array_equal(objective.order(0, SEQ + 1), np.arange(SEQ + 1))
    assert len({objective.order(index, SEQ + 1).tobytes() for index in range(6)}) == 6
    assert np.array_equal(objective.order(3, SEQ + 1), objective.order(3, SEQ + 1))


def test_predefined_orders_stray_further_with_their_index():
    objective = PermutedAR(num_orders=100, predefined=True, seed=1)
    strays = [np.abs(objective.order(index, 513) - np.arange(513)).mean() for index in (1, 10, 60)]
    assert strays[0] < 2 < strays[1] < 20 < strays[2]


def test_labels_are_the_next_tokens_of_the_order(objective):
    tokens = torch.arange(SEQ + 1).expand(40, SEQ + 1).contiguous() + 100  # token = 100 + position
    batch = prepare(objective, tokens, torch.arange(40))
    assert torch.equal(batch.inputs.position_ids, batch.inputs.input_ids - 100)  # a token keeps its own position
    assert torch.equal(batch.targets.labels[:, :-1], batch.inputs.input_ids[:, 1:])
    whole = torch.cat((batch.inputs.input_ids, batch.targets.labels[:, -1:]), dim=1)
    assert torch.equal(whole.sort(dim=-1).values, tokens)  # nothing lost, also not the last label
    assert torch.equal(batch.targets.loss_weights, torch.ones(40, SEQ)) and isinstance(objective.attention_mask, Causal)


def test_samples_choose_among_the_orders_evenly(objective):
    orders = {objective.order(index, SEQ + 1)[:-1].tobytes(): index for index in range(6)}
    batch = prepare(objective, make_tokens(3000), torch.arange(3000))
    chosen = [orders[row.numpy().tobytes()] for row in batch.inputs.position_ids]
    counts = np.bincount(chosen, minlength=6)
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-squared with 5 degrees of freedom, 0.1 %


def test_batches_do_not_depend_on_layout(objective):
    tokens = make_tokens(16)
    whole = prepare(objective, tokens, torch.arange(16))
    part = prepare(objective, tokens[[7, 3]], torch.tensor([7, 3]))
    assert torch.equal(part.inputs.position_ids, whole.inputs.position_ids[[7, 3]]) and torch.equal(
        part.targets.labels, whole.targets.labels[[7, 3]]
    )


@torch.no_grad()
def test_one_order_is_plain_ar():
    tokens = make_tokens(4)
    model = tiny_model(Causal(), vocab=64, seq=SEQ)
    batch = prepare(make_objective("--num-order-list", "1", objective="ar"), tokens, torch.arange(4))
    plain = prepare(make_objective(objective="ar"), tokens, torch.arange(4))
    assert torch.equal(batch.inputs.input_ids, plain.inputs.input_ids) and torch.equal(
        batch.targets.labels, plain.targets.labels
    )
    moved = model.logits(
        batch.inputs.input_ids, position_ids=batch.inputs.position_ids, sample_ids=batch.inputs.sample_ids
    )
    torch.testing.assert_close(moved, model.logits(plain.inputs.input_ids))
    torch.testing.assert_close(model.loss(batch), model.loss(plain))


@torch.no_grad()
def test_positions_move_along_with_tokens(objective):
    """The next token of an order is predicted from a set of (token, position) pairs, whatever their order was."""
    tokens = make_tokens(1)[:, : SEQ + 1]
    model = tiny_model(Causal(), vocab=64, seq=SEQ)
    order = torch.from_numpy(objective.order(4, SEQ + 1))[None, :-1]
    straight = model.logits(tokens[:, :-1].gather(1, order.sort().values.clamp(max=SEQ - 1)))
    moved = model.logits(tokens.gather(1, order), position_ids=order, sample_ids=torch.tensor([0]))
    assert (moved - straight).abs().max() > 1e-2  # another order is another context
    # One layer of causal attention at the last place is a sum over a set; with its own position the order is irrelevant.
    one = tiny_model(Causal(), vocab=64, seq=SEQ)
    one.model.layers = one.model.layers[:1]
    shuffled = torch.cat((order[:, torch.randperm(SEQ - 1)], order[:, -1:]), dim=1)
    last = [
        one.logits(tokens.gather(1, o), position_ids=o, sample_ids=torch.tensor([0]))[:, -1] for o in (order, shuffled)
    ]
    torch.testing.assert_close(last[0], last[1], rtol=1e-4, atol=1e-4)


def test_evaluation_is_plain_ar(objective):
    tokens, ids = make_tokens(4), torch.arange(4)
    evaluated = objective.for_eval()
    assert evaluated.label == "NLL (exact)"
    assert_same_batch(prepare(evaluated, tokens, ids), prepare(make_objective(objective="ar"), tokens, ids))


@pytest.mark.parametrize("flags", [["--use-order-list"], ["--use-order-list", "--num-order-list", "0"]])
def test_an_order_list_needs_orders(flags):
    with pytest.raises(ValueError, match="num-order-list"):
        make_objective(*flags, objective="ar")
