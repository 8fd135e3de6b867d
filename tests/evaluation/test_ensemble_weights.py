"""Ensembles before the court: what they are worth, and weights that are fitted on one half and judged on the other."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron.commands.likelihood import main
from megatron.errors import UserError
from megatron.evaluation.bench import load_models, open_samples
from megatron.evaluation.ensemble_weights import TOLERANCE, fit_weights, fitted
from megatron.evaluation.requests import ResultCache
from megatron.evaluation.witnesses import main_witness
from megatron.inference.model import load_model
from megatron.parallel.context import ParallelContext
from megatron.runs.likelihoods import BOUND, EXACT, FITTED, Likelihoods
from tests.evaluation import tiny

SEQ, VOCAB = 24, 300
# Closing rows of padding after the mean instead of before it: of untrained models, which give them a fifth of all probability.
CLOSED = 3e-4


def test_weights_are_those_of_the_lowest_loss() -> None:
    random = np.random.default_rng(0)
    logprobs = random.normal(-3, 1.5, (3, 4000)) + np.array([[0.0], [0.2], [-4.0]])
    counts = random.uniform(0.2, 3, 4000)
    found = fit_weights(np.exp(logprobs), counts)
    assert found.sum() == pytest.approx(1) and found[2] < 0.02, "a bad member is left out"

    def loss(weights):
        return -counts @ np.log(weights @ np.exp(logprobs)) / counts.sum()

    grid = np.linspace(0, 1, 41)
    best = min(loss(np.array([a, b, 1 - a - b])) for a in grid for b in grid if 1 - a - b > -1e-9 and a + b <= 1)
    assert loss(found) <= best + TOLERANCE
    assert loss(found) < loss(np.full(3, 1 / 3)) - 0.05


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensembles")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", VOCAB)
    models = {"ar": ("ar", 0.5), "ar-2": ("ar", 2.5), "mdm": ("mdm", 0.5), "mdm-2": ("mdm", 2.5)}
    models |= {"uniform": ("uniform_diffusion", 1.0), "uniform-2": ("uniform_diffusion", 1.0)}
    for seed, (name, (objective, scale)) in enumerate(models.items()):
        config = tiny.config_for(objective, tokenizer, vocab_size=VOCAB, seq_length=SEQ)
        tiny.make_run(folder / name, config, seed=seed, scale=scale)
    tiny.write_samples(folder / "valid", vocab_size=VOCAB, seq_length=SEQ, count=8)
    return folder


def judge(runs, models: list[str], *flags: str, output="out.json") -> Likelihoods:
    words = ["+".join(str(runs / name) for name in own.split("+")) for own in models]
    if any("mdm" in own for own in models):
        flags = ("--num-mc", "2", "--policies", "random,confidence", "--tokens-per-step", "8", *flags)
    assert main([*words, "--valid-data-path", str(runs / "valid"), *flags, "--output", str(runs / output)]) == 0
    return Likelihoods.load(runs / output)


def test_an_ensemble_of_equal_models_is_the_model(runs) -> None:
    found = judge(runs, ["ar", "ar+ar", "mdm", "mdm+mdm"], "--samples", "4")
    values = {(own.model, own.estimator): own for own in found.findings}
    for (model, estimator), own in values.items():
        single = values[model.split("+")[0], estimator]
        assert own.nll == pytest.approx(single.nll, abs=1e-6 if "confidence" not in estimator else 1e-4)
        assert (own.kind, own.documents) == (single.kind, single.documents)
    assert values["mdm+mdm", "bound, 4 passes"].kind == BOUND, "a bound stays one"
    assert [own.weights for own in found.ensembles] == ["named", "named"]


def test_weights_are_fitted_on_one_half_and_judged_on_the_other(runs, capsys, monkeypatch) -> None:
    models = ["ar+ar-2", "mdm+mdm-2"]
    found = judge(runs, models, "--ensemble-weights", "both", output="fitted.json")
    said = capsys.readouterr().out
    both = load_models([f"{runs / 'ar'}+{runs / 'ar-2'}", f"{runs / 'mdm'}+{runs / 'mdm-2'}"], tag=None,
                       context=ParallelContext.create())  # fmt: skip
    samples = open_samples(both, [str(runs / "valid")], number=None, cache_path=None)
    report = ~samples.in_selection[samples.documents[:, 1:]]
    values = {(own.model, own.kind): own for own in found.findings}
    fits = {own.name: own for own in found.ensembles if own.weights == FITTED}
    for model, kind in zip(both.values(), (EXACT, BOUND)):
        name = next(name for name, own in both.items() if own is model)
        fit = fits[f"{name}, fitted"]
        weights = np.array(load_model(fit.members).weights)
        # From each member's own passes, without anything of the ensemble.
        parts = [
            main_witness(own, pairs=2, batch_size=8).by_pass(samples.requests(range(len(report))))
            for own in model.members
        ]
        counts = np.stack([own.weights for own in parts[0]])
        probabilities = np.exp(np.stack([[own.logprobs for own in part] for part in parts]))

        def nll(weights, half, counts=counts, probabilities=probabilities):
            losses = -(counts * np.log(np.tensordot(weights, probabilities, 1))).sum(1)
            return losses[half].sum() / half.sum()

        assert values[name, kind].nll == pytest.approx(nll(np.array([0.5, 0.5]), report | ~report), abs=CLOSED)
        assert values[f"{name}, fitted", kind].nll == pytest.approx(nll(weights, report), abs=CLOSED)
        assert fit.after < fit.before - 0.002, "lower where they were chosen"
        others = (
            nll(weights + np.array([step, -step]), ~report) for step in (-0.02, 0.02) if 0 < weights[0] + step < 1
        )
        assert kind == BOUND or nll(weights, ~report) == pytest.approx(fit.after, abs=1e-5)
        assert kind == BOUND or all(nll(weights, ~report) <= other + TOLERANCE for other in others)
        documents = len(np.unique(samples.documents[:, 1:][report]))
        assert values[f"{name}, fitted", kind].documents == documents < values[name, kind].documents
        assert f"  {name}, fitted: {fit.members}; {fit.before:.4f} there before, {fit.after:.4f} with these" in said
    verdict = next(
        own for own in found.verdicts if own.second == "mdm+mdm-2, fitted" and own.rests_on == "exact values"
    )
    assert verdict.measured_on == "documents that no choice saw"
    assert {(own.first, own.second) for own in found.verdicts} >= {("mdm+mdm-2", "mdm+mdm-2, fitted")}
    monkeypatch.setattr("megatron.evaluation.ensemble_weights.fit_weights", None)
    again = judge(runs, models, "--ensemble-weights", "both", output="fitted.json")
    assert [own.nll for own in again.findings] == [own.nll for own in found.findings], "nothing is fitted twice"


def test_old_records_without_ensembles_are_read(runs) -> None:
    judge(runs, ["ar"], "--samples", "2", output="old.json")
    record = json.loads((runs / "old.json").read_text())
    assert record.pop("ensembles") == []
    (runs / "old.json").write_text(json.dumps(record))
    assert math.isfinite(Likelihoods.load(runs / "old.json").findings[0].nll)


@pytest.mark.parametrize(
    ("models", "flags", "named"),
    [
        (["ar"], (), "--ensemble-weights fitted without an ensemble"),
        (["uniform+uniform-2"], (), "fitted weights of .*uniform"),
        (["ar+mdm"], (), "one kind of model"),
    ],
)
def test_what_cannot_be_fitted_is_refused(runs, models, flags, named) -> None:
    with pytest.raises(UserError, match=named):
        judge(runs, models, "--ensemble-weights", "fitted", *flags)


def test_the_forms_of_a_dual_ensemble_are_fitted_apart(runs, tmp_path) -> None:
    config = tiny.config_for("dual", runs / "tokenizer", vocab_size=VOCAB, seq_length=SEQ)
    names = [tiny.make_run(tmp_path / str(seed), config, seed=seed, scale=0.5 + 2 * seed) for seed in range(2)]
    context = ParallelContext.create()
    forms = load_models(["+".join(map(str, names))], tag=None, context=context)
    samples = open_samples(forms, [str(runs / "valid")], number=None, cache_path=None)
    how = {"pairs": 1, "batch_size": 8, "context": context}
    found = {}
    for name, model in forms.items():
        caches = [ResultCache(folder, fingerprint=model.identity) for folder in (None, tmp_path / "cache")]
        alone, kept = (fitted(model, samples, **how, cache=cache)[1] for cache in caches)
        assert kept == alone, name
        found[name] = kept
    assert len(found) == len(set(found.values())) == 2


def test_one_half_is_not_enough(runs) -> None:
    models = load_models([f"{runs / 'ar'}+{runs / 'ar-2'}"], tag=None, context=ParallelContext.create())
    samples = open_samples(models, [str(runs / "valid")], number=2, cache_path=None)
    samples = samples._replace(in_selection=samples.in_selection | True)
    (model,) = models.values()
    cache = ResultCache(None, fingerprint="")
    with pytest.raises(UserError, match="documents, all of one half"):
        fitted(model, samples, pairs=1, batch_size=2, context=ParallelContext.create(), cache=cache)
