"""Uniform-state diffusion: what its noise is, that its loss is the bound in expectation, and that the bound is one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from layouts import jobs
from objective_helpers import SEQ, make_config, make_objective, make_tokens, prepare, within_standard_errors

from megatron import randomness as noise
from megatron.config.schema import BERNOULLI
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.errors import UserError
from megatron.model.loss import HeadOutput
from megatron.objectives import build_objective, with_vocabulary
from megatron.objectives.base import BOUND, UniformDecoding
from megatron.objectives.uniform_diffusion import UniformDiffusion, inner, noise_by_count
from megatron.parallel.context import ParallelContext
from megatron.testing.checks import check_noise_is_of_the_sample
from tests.evaluation import toy
from tests.evaluation.uniform_chain import LENGTH, STATES, VOCAB, ancestral_distribution, exact_bounds, predictions

NAME = ["--objective", "uniform_diffusion", "--noise-vocab-size", "50"]


def make(**changes) -> UniformDiffusion:
    return replace(UniformDiffusion(50, global_batch_size=8, seed=1), **changes)


def test_noise_is_that_of_independent_coins_whose_probability_is_uniform() -> None:
    """A noised position shows any of V tokens; the count is uniform over 0 … L; without a weight the share is Beta(m, …)."""
    drawn = make(stratified=False).noise(np.arange(6000), 8)
    counts = np.bincount(drawn.is_noised.sum(1), minlength=9)
    assert ((counts - 6000 / 9) ** 2 / (6000 / 9)).sum() < 26.1  # chi-square, 8 degrees, p > 0.001
    tokens = np.bincount(drawn.tokens.ravel(), minlength=50)
    assert len(tokens) == 50 and ((tokens - 960) ** 2 / 960).sum() < 85.4  # 49 degrees
    assert ((drawn.share > 0) & (drawn.share < 1)).all()


def test_the_weight_undoes_how_the_share_is_drawn() -> None:
    """Mean of weight · f over counts and shares is ∫ E f / share d share, for functions of both."""
    random = np.random.default_rng(0)
    length, nodes = 5, np.linspace(0, 1, 200_001)[1:-1]
    for power, of_count in ((1, False), (2, False), (1, True), (2, True)):
        values = []
        for t in (np.arange(60_000) + random.random()) / 60_000:
            _, is_noised, share, weight = noise_by_count(random, t, length, vocab_size=9)
            values.append(weight * share**power * (is_noised.sum() if of_count else 1))
        expected = (nodes ** (power - 1) * (nodes * length if of_count else 1)).mean()
        assert within_standard_errors(np.array(values), expected, 4)


def test_pairs_of_evaluation_noise_every_position() -> None:
    objective, ids = make().for_eval(0, 4), np.arange(64)
    for draw in (0, 2):
        first, second = (replace(objective, draw=d).noise(ids, SEQ) for d in (draw, draw + 1))
        assert (first.is_noised | second.is_noised).all()
        assert (first.is_noised & second.is_noised).sum(1).max() <= 1
    single = [replace(objective, num_draws=3, draw=2).noise(ids, SEQ).is_noised.sum(1)]
    assert single[0].max() > SEQ * 0.9 and single[0].min() < SEQ * 0.1, "the last of an odd number stands alone"


def test_shares_at_the_ends_have_counts_and_odds() -> None:
    _, is_noised, share, weight = noise_by_count(noise.generator(1, "x", 0), 1.0, 8, vocab_size=9)
    assert is_noised.all() and weight == 9 / 8 and share < 1, "as of the second of two draws at t = 0"
    odds = make().odds(np.array([inner(0.0), inner(1.0)])).astype(np.float32)
    assert np.isfinite(odds).all() and (odds > 0).all()


def test_token_weights_are_one_on_average_over_draws() -> None:
    """What a validation gives back to the documents of a sample."""
    views = [make().for_eval(draw, 400) for draw in range(400)]
    weights = np.stack([view.token_weights(np.arange(3), 8) for view in views])
    assert abs(weights.mean() - 1) < 0.02
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.4)


def test_a_batch_shows_noise_where_there_is_some_and_every_token_is_a_label() -> None:
    objective, tokens, ids = make_objective(*NAME), make_tokens(16), torch.arange(16)
    assert isinstance(objective, UniformDiffusion)
    batch, drawn = prepare(objective, tokens, ids), objective.noise(ids.numpy(), SEQ)
    labels = batch.targets.labels
    assert torch.equal(labels, tokens[:, :-1]) and batch.targets.positions.numel() == labels.numel()
    kept = torch.from_numpy(~drawn.is_noised)
    assert torch.equal(batch.inputs.input_ids[kept], labels[kept])
    assert 0 < (batch.inputs.input_ids != labels).float().mean() < 1
    assert torch.equal(batch.targets.noised, batch.inputs.input_ids)
    odds = torch.from_numpy(50 * (1 - drawn.share) / drawn.share).float()
    assert torch.equal(batch.targets.odds, odds[:, None].expand_as(labels))
    assert objective.label == objective.for_eval().label == BOUND and objective.decoding == UniformDecoding(50)
    assert objective.loss_fraction == 1.0


class Enumerated:
    """The toy model as hidden states and a matrix: hidden are its logits, the matrix is one."""

    def __init__(self, seed: int) -> None:
        self.model = toy.ToyMaskedModel(vocab=VOCAB, length=LENGTH, seed=seed)

    @torch.no_grad()
    def losses(self, objective: UniformDiffusion, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Sum over positions of each sample, all of them with the tokens of a row, under the same noise. [rows, samples]"""
        drawn, sums = objective.noise(ids, LENGTH), []
        with mock.patch.object(UniformDiffusion, "noise", return_value=drawn):
            for row in rows:
                tokens = torch.from_numpy(np.append(row, 0)).expand(len(ids), -1)
                batch = prepare(objective, tokens, torch.from_numpy(ids))
                output = HeadOutput(self.model(batch.inputs.input_ids), torch.eye(VOCAB))
                sums.append(objective.loss.per_token(output, batch.targets, ParallelContext()).double().sum(-1))
        return torch.stack(sums).numpy()


@pytest.mark.parametrize("way", ["training", "evaluation", "one draw", "bernoulli"])
def test_the_mean_loss_is_the_enumerated_bound(way) -> None:
    own, rows = Enumerated(seed=3), STATES[[7, 300, 611]]
    base = UniformDiffusion(VOCAB, global_batch_size=64, seed=5)
    if way == "training":
        losses = own.losses(base, rows, np.arange(64 * 400)).reshape(3, 400, 64).mean(2)
    elif way == "evaluation":
        losses = np.mean([own.losses(base.for_eval(draw, 4), rows, np.arange(8000)) for draw in range(4)], axis=0)
    else:
        estimator = BERNOULLI if way == "bernoulli" else base.valid_estimator
        losses = own.losses(replace(base, valid_estimator=estimator).for_eval(), rows, np.arange(60_000))
    tolerance = (
        5 if way == "bernoulli" else 4
    )  # times are spread: below the error of independent draws; a floor at 1e-3
    for found, expected in zip(losses, exact_bounds(own.model, rows).sum(-1)):
        assert within_standard_errors(found, float(expected), tolerance), (found.mean(), expected)


def test_counts_in_pairs_vary_less_than_coins() -> None:
    """At equal passes, as for masks."""
    own, base = Enumerated(seed=3), UniformDiffusion(VOCAB, global_batch_size=64, seed=5)
    spreads = []
    for estimator in (base.valid_estimator, BERNOULLI):
        views = [replace(base, valid_estimator=estimator).for_eval(draw, 2) for draw in range(2)]
        spreads.append(np.mean([own.losses(view, STATES[[300]], np.arange(8000)) for view in views], axis=0).std())
    assert spreads[0] < 0.75 * spreads[1], spreads


@pytest.mark.parametrize("seed", [0, 3])
def test_the_bound_is_above_the_exact_likelihood_of_the_sampler(seed) -> None:
    """For every 25th of the 625 rows; the ancestral sampler in 256 steps, enumerated, whose own bound it is in the limit."""
    model = toy.ToyMaskedModel(vocab=VOCAB, length=LENGTH, seed=seed)
    law, rows = ancestral_distribution(model, 256), STATES[::25]
    assert law.sum() == pytest.approx(1, abs=1e-10)
    bounds = exact_bounds(model, rows).sum(-1)
    gaps = bounds + np.log(law[::25])
    assert (gaps > 0).all() and gaps.min() < 1.0, gaps
    assert discrete_bound(model, rows[3], steps=256) == pytest.approx(bounds[3], abs=0.04)


def discrete_bound(model, tokens: np.ndarray, steps: int) -> float:
    """Σ over steps of E KL(q(z_s | z_t, x) ‖ p_θ(z_s | z_t)): what the time integral of ℓ is the limit of."""
    probs, same, total = np.exp(predictions(model)), np.eye(VOCAB), 0.0
    for index in range(steps):
        now, later = index / steps, (index + 1) / steps
        seen = np.where(tokens == STATES, now + (1 - now) / VOCAB, (1 - now) / VOCAB).prod(-1)
        stays = now / later * same[STATES] + (1 - now / later) / VOCAB  # [states, length, z_s]
        ours = stays * (later * same[tokens] + (1 - later) / VOCAB)
        theirs = stays * (later * probs + (1 - later) / VOCAB)
        ours, theirs = ours / ours.sum(-1, keepdims=True), theirs / theirs.sum(-1, keepdims=True)
        total += float(seen @ (ours * np.log(np.where(ours > 0, ours, 1) / theirs)).sum((1, 2)))
    return total


def test_the_vocabulary_is_that_of_the_tokens_not_of_the_padding() -> None:
    flags = make_config("--objective", "uniform_diffusion").objective
    assert flags.options["noise_vocab_size"] is None
    assert with_vocabulary(flags, None, size=50, padded=128).options["noise_vocab_size"] == 50
    for wrong in (49, 129):
        given = replace(flags, options={**flags.options, "noise_vocab_size": wrong})
        with pytest.raises(UserError, match=f"--noise-vocab-size {wrong}"):
            with_vocabulary(given, None, size=50, padded=128)
    with pytest.raises(UserError, match="no vocabulary"):
        build_objective(make_config("--objective", "uniform_diffusion"))


def test_noise_is_of_the_sample() -> None:
    """The same after a resume, on any rank and in any micro-batch: replaced tokens, places, shares and weights."""
    objective = make(seed=77)
    for view in (objective, objective.for_eval(1, 4)):
        check_noise_is_of_the_sample(lambda ids, view=view: tuple(view.noise(np.array(ids), SEQ)), range(40))
    whole, other = (make(seed=seed).noise(np.arange(40), SEQ) for seed in (77, 78))
    assert not np.array_equal(other.tokens, whole.tokens)
    assert objective.for_eval().seed == noise.EVAL_SEED


def run_apart(argv: list[str]) -> int:
    """The exit status of pretrain_mdm.py."""
    program = Path(__file__).parents[2] / "pretrain_mdm.py"
    return subprocess.run([sys.executable, program, *argv], timeout=200, capture_output=True, check=False).returncode


def test_a_small_run_learns_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """By the program, on documents that count upwards: from the loss of guesses (log 8) to that of who sees what comes next;
    and the steps after a resume are those of the run that was not stopped."""
    random = np.random.default_rng(0)
    for name, count in (("train", 400), ("valid", 40)):
        with IndexedDatasetWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for start in random.integers(8, size=count):
                writer.add_document(((start + np.arange(34)) % 8).astype(np.uint16))
    small = {"seq-length": 16, "vocab-size": 8, "global-batch-size": 32, "micro-batch-size": 32}
    flags = {"lr": 5e-3, "lr-decay-style": "constant", "valid-data-path": tmp_path / "valid", "eval-iters": "full"}
    flags |= {**small, "objective": "uniform_diffusion", "num-mc": 2, "save-interval": 160, "train-iters": 200}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_apart(jobs.flags(tmp_path, whole, **flags)) == 0
    parts.mkdir()  # as the run left its folder when it was stopped behind its checkpoint of step 160
    for name in ("run.json", "global_step160"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, parts / name)
    (parts / "latest").write_text("global_step160")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (parts / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 160))
    assert run_apart(jobs.flags(tmp_path, parts, **flags, load=parts)) == 0
    losses = {step: record["loss"] for step, record in jobs.records(whole).items()}
    first, last = (np.mean([losses[step] for step in steps]) for steps in (range(1, 6), range(181, 201)))
    assert first > 1.9 and last < 1.2, (first, last)
    valid = jobs.records(whole, "valid")[200]
    assert valid["label"] == BOUND and valid["nll"] < 1.2
    resumed = jobs.records(parts)
    assert [resumed[step]["loss"] for step in range(161, 201)] == [losses[step] for step in range(161, 201)]
    config = json.loads((whole / "run.json").read_text())["config"]
    assert config["objective"]["noise_vocab_size"] == 8
