"""What holds for every objective of the registry, also for the next one."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    make_config,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
)

from megatron.model.batch import Stream
from megatron.model.visibility import visible_keys
from megatron.objectives import OBJECTIVES, build_objective, needs_mask_token
from megatron.objectives.base import BOUND, EXACT, NO_BOUND, CausalDecoding, is_exact
from megatron.testing.checks import check_noise_is_of_the_sample
from megatron.training.validation import likelihood_fields

NEEDED = {
    "permuted_ar": ["--num-order-list", "4"],
    "masked_attention_ar": ["--randmask-ratio", "0.5"],
    "masked_input_ar": ["--input-mask-ratio", "0.5"],
    "block_diffusion": ["--block-size", "4"],
    "uniform_diffusion": ["--noise-vocab-size", "50"],
    "augmented_ar": ["--noise-vocab-size", "50"],
}


NOISE = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())


def flags_of(name: str) -> list[str]:
    return ["--objective", name, *NEEDED.get(name, [])]


@pytest.fixture(params=sorted(OBJECTIVES))
def name(request) -> str:
    return request.param


def test_objectives_import_no_torch():
    """So that ``--help`` and wrong flags answer at once."""
    program = "import sys, megatron.objectives, megatron.model.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["ar", "mdm", "maskgit"])
def test_a_run_imports_its_own_objective_and_no_other(name):
    program = (
        "import sys; from megatron.objectives import *;"
        "config = parse('--model 7M --train-iters 1 --objective'.split() + [sys.argv[1]]);"
        "print(*(m for m in OBJECTIVES.places if 'megatron.objectives.' + m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, name], timeout=60, capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) == ({"ar"} if name == "ar" else {"mdm", name})


def test_noise_is_a_function_of_sample_ids(name):
    objective, tokens = make_objective(*flags_of(name)), make_tokens(24)
    for view in (objective, objective.for_eval(1, 4)):

        def draw(ids: list[int], view=view) -> tuple[torch.Tensor, ...]:
            batch = prepare(view, tokens[ids], torch.tensor(ids))
            inputs, targets = batch.inputs, batch.targets
            parts = (inputs.input_ids, targets.labels, targets.loss_weights, inputs.position_ids)
            views = (part.unflatten(0, (-1, len(ids))).transpose(0, 1) for part in parts if part is not None)
            return tuple(views)  # all views of a sample together

        check_noise_is_of_the_sample(draw, range(24))


def fingerprints(name: str) -> dict[str, list[float]]:
    """Of batches of an objective, by kind of noise: a checksum of what the model reads and sees, and a moment of the
    weights."""
    one, two = (build_objective(make_config(*flags_of(name)), scheme=scheme) for scheme in (1, 2))
    coins = make_objective(*flags_of(name), "--valid-data-path", "x", "--valid-estimator", "bernoulli")
    views = {"training, scheme 1": one, "training, scheme 2": two, "draw 0 of 1": two.for_eval(),
             "draw 1 of 2": two.for_eval(1, 2), "coins, draw 1 of 2": coins.for_eval(1, 2)}  # fmt: skip
    tokens, found = torch.arange(24 * (SEQ + 1)).reshape(24, -1) * 7 % 50, {}
    for kind, view in views.items():
        inputs, targets = prepare(view, tokens, torch.arange(24))
        seen = visible_keys(view.attention_mask, Stream(torch.zeros(*inputs.input_ids.shape, 1), *inputs[1:]))
        read = [part for part in (inputs.input_ids, inputs.position_ids, seen) if isinstance(part, torch.Tensor)]
        weights = targets.loss_weights.double().flatten().numpy()
        checksum = zlib.crc32(b"".join(part.contiguous().numpy().tobytes() for part in read))
        found[kind] = [checksum, float(weights @ np.arange(len(weights)))]
    return found


def test_noise_is_that_of_earlier_versions(name):
    """Runs that were begun with them go on, and validations are compared with theirs."""
    expected = {kind: [read, pytest.approx(moment, rel=1e-5)] for kind, (read, moment) in NOISE[name].items()}
    assert fingerprints(name) == expected


def test_evaluation_does_not_depend_on_seed_or_batch_size(name):
    tokens, ids = make_tokens(12), torch.arange(12)
    first, second = (make_objective(*flags_of(name), **o).for_eval(1, 4) for o in ({}, {"seed": 77, "batch": 5}))
    assert_same_batch(prepare(first, tokens, ids), prepare(second, tokens, ids))
    assert first.attention_mask == second.attention_mask
    again = first.for_eval(1, 4)  # evaluation settings of an evaluation objective are itself
    assert_same_batch(prepare(again, tokens, ids), prepare(first, tokens, ids))


VARIANTS = [*([flags_of(name), f"--objective {name}"] for name in sorted(OBJECTIVES)),
            [["--complementary-masks"], "complementary"],
            [[*flags_of("block_diffusion"), "--block-ar-weight", "0.5"], "blocks and AR"],
            [["--objective", "dual", "--dual-ar-share", "0.25"], "a quarter AR"]]  # fmt: skip


@pytest.mark.parametrize("flags", [flags for flags, _ in VARIANTS], ids=[called for _, called in VARIANTS])
def test_flops_are_counted_of_the_tokens_in_the_loss(flags):
    objective = make_objective(*flags, batch=64)
    batch = prepare(objective, make_tokens(1280), torch.arange(1280))
    share = batch.targets.positions.numel() / (1280 * SEQ)
    assert objective.loss_fraction == pytest.approx(share, abs=0.1 if "augmented_ar" in flags else 0.02)
    assert objective.num_views == len(batch.inputs.input_ids) / 1280


def test_labels_are_honest(name):
    objective = make_objective(*flags_of(name))
    assert {objective.label, objective.for_eval().label} <= {EXACT, BOUND, NO_BOUND}
    seeded = [make_objective(*flags_of(name), seed=seed) for seed in (1, 2)]
    inputs = [prepare(view, make_tokens(24), torch.arange(24)).inputs.input_ids for view in seeded]
    has_noise = not torch.equal(*inputs) or seeded[0].attention_mask != seeded[1].attention_mask
    assert not (is_exact(objective) and has_noise), "a loss with noise in it is no likelihood"
    assert is_exact(objective) or name != "ar"
    assert objective.for_eval().label != NO_BOUND
    assert is_exact(objective.for_eval()) == isinstance(objective.decoding, CausalDecoding)


@pytest.mark.parametrize("flags", [["--ar-ratio", "0.5"], ["--low-noise-start", "--low-noise-iter", "2"]])
def test_training_noise_that_spoils_the_bound_is_said(flags):
    objective = make_objective(*flags)
    assert objective.label == NO_BOUND and objective.for_eval().label == BOUND


def test_the_mask_token_is_asked_for_exactly_where_it_is_used(name):
    batch = prepare(make_objective(*flags_of(name)), make_tokens(64), torch.arange(64))
    assert bool((batch.inputs.input_ids == MASK_ID).any()) == needs_mask_token(name)


def test_labels_are_tokens_and_weights_are_not_negative(name):
    batch = prepare(make_objective(*flags_of(name)), make_tokens(16), torch.arange(16))
    assert (
        batch.targets.labels.dtype == batch.inputs.input_ids.dtype == torch.int64
        and batch.targets.loss_weights.dtype == torch.float32
    )
    assert int(batch.targets.labels.max()) < MASK_ID  # the mask token is never an answer
    assert bool((batch.targets.loss_weights >= 0).all()) and batch.targets.num_tokens.sum() == 16 * SEQ
    assert torch.equal(batch.targets.positions, batch.targets.loss_weights.flatten().nonzero().squeeze(-1))


def test_a_training_step_gives_gradients_to_all_weights(name):
    objective = make_objective(*flags_of(name))
    model = tiny_model(objective.attention_mask, vocab=64, seq=SEQ)
    model.kind = objective.loss
    loss = model.loss(prepare(objective, make_tokens(8), torch.arange(8)))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.parameters())
    with torch.no_grad():
        evaluated = objective.for_eval()
        model.mask = evaluated.attention_mask
        losses = model.sample_losses(prepare(evaluated, make_tokens(8), torch.arange(8)))
    assert losses.shape == (8,) and torch.isfinite(losses).all()


def test_the_evaluation_objective_needs_no_batch_size(name):
    config = make_config(*flags_of(name))
    unknown = type(config)(**{**vars(config), "run": type(config.run)()})
    assert build_objective(unknown).for_eval().label == build_objective(config).for_eval().label


OTHERS_FLAGS = [["--ar-ratio", "0.1"], ["--random-length-ratio", "0.1"], ["--block-size", "4"], ["--randmask-ratio", "0.1"],
                ["--input-mask-ratio", "0.1"], ["--num-order-list", "3"], ["--noise-schedule", "cosine"],
                ["--independent-t"], ["--low-noise-start"]]  # fmt: skip


@pytest.mark.parametrize("flags", OTHERS_FLAGS, ids=lambda flags: flags[0])
def test_a_flag_of_another_objective_is_refused(flags):
    accepted = []
    for name in OBJECTIVES:
        own = NEEDED.get(name, [])
        try:
            make_config("--objective", name, *own, *([] if flags[0] in own else flags))
            accepted.append(name)
        except ValueError as error:
            assert flags[0] in str(error)  # noqa: PT017
    assert accepted and "ar" not in accepted and len(accepted) < len(OBJECTIVES)


@pytest.mark.parametrize("label", [EXACT, BOUND, NO_BOUND])
def test_only_likelihoods_have_a_perplexity(label):
    record = likelihood_fields(2.0, label=label, bytes_per_token=4.0)
    assert (record["ppl"] is None) == (record["bits_per_byte"] is None) == (label == NO_BOUND)
