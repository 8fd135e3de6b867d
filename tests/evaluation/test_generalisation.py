"""Losses on seen and unseen documents: those of the court, by the share that is hidden, and kept beside the run."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.checkpoint.files import read_manifest, write_manifest
from megatron.commands.generalisation import main
from megatron.errors import UserError
from megatron.evaluation.bench import load_models, open_samples
from megatron.evaluation.court import hear
from megatron.evaluation.generalisation import measure
from megatron.evaluation.requests import ResultCache
from megatron.evaluation.witnesses import main_witness
from megatron.parallel.context import ParallelContext
from megatron.runs.generalisation import Generalisation, Point
from megatron.statistics import mean_loss
from tests.evaluation import tiny

SEQ, VOCAB = 25, 300  # 24 tokens are scored, and fall evenly into 4 bins
CONTEXT = ParallelContext()
KINDS = {"ar": ("ar", {}), "mdm": ("mdm", {}), "blocks": ("block_diffusion", {"block_size": 5}),
         "uniform": ("uniform_diffusion", {})}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generalisation")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", VOCAB)
    for name, (objective, more) in KINDS.items():
        config = tiny.config_for(objective, tokenizer, vocab_size=VOCAB, seq_length=SEQ, **more)
        write_run(folder / name, objective, validations=1)
        for step in (2, 4):
            tiny.make_run(folder / name, config, seed=step, step=step, scale=2.0)
    for seed, name in enumerate(("train", "valid")):
        tiny.write_samples(folder / name, vocab_size=VOCAB, seq_length=SEQ, count=6 + seed, seed=seed)
    return folder


def test_losses_are_those_of_the_court_and_fall_into_bins(runs) -> None:
    models = load_models([str(runs / name) for name in KINDS], tag=None, context=CONTEXT)
    samples = open_samples(models, [str(runs / "valid")], number=3, cache_path=None)
    for name, model in models.items():
        witness = main_witness(model, pairs=4, batch_size=8)
        finding = hear(witness, samples, model=name, cache=ResultCache(None, fingerprint=""), context=CONTEXT, chunk=8)
        found = measure(model, samples, pairs=4, bins=4, batch_size=8)
        assert mean_loss(found.sums(0)).value == pytest.approx(finding.value.value, abs=1e-9), name
        assert found.tokens[0].sum() == 3 * (SEQ - 1)
        if name == "ar":
            np.testing.assert_array_equal(found.tokens[1:].sum(1), [18] * 4)
            assert found.loss[1:].sum() == pytest.approx(found.loss[0].sum())
            assert mean_loss(found.sums(0)).error == pytest.approx(finding.value.error, abs=1e-9)
        if name == "mdm":
            np.testing.assert_array_equal(found.tokens, np.tile(found.tokens[0], (5, 1)))
            assert found.loss[1:].sum(1).mean() == pytest.approx(found.loss[0].sum()), "the bound is the mean over bins"
        if name == "uniform":
            assert not found.tokens[1:].any()


@pytest.mark.parametrize("objective", ["mdm", "block_diffusion"])
def test_uniform_predictions_lose_as_much_in_every_bin(runs, tmp_path, objective) -> None:
    """Also where every mask of a block of 4 is run once, and those of 2 tokens are likelier than others."""
    more = {"block_size": 4} if objective == "block_diffusion" else {}
    config = tiny.config_for(objective, runs / "tokenizer", vocab_size=VOCAB, seq_length=24, **more)
    models = load_models([str(tiny.make_run(tmp_path / "run", config, scale=0.0))], tag=None, context=CONTEXT)
    name = main_witness(models["run"], pairs=8, batch_size=8).name
    assert name == ("bound, all masks" if more else "bound, 16 passes")
    samples = open_samples(models, [str(runs / "valid")], number=3, cache_path=None)
    found = measure(models["run"], samples, pairs=8, bins=4, batch_size=8)
    losses = [mean_loss(found.sums(part)).value for part in range(5)]
    assert losses == pytest.approx([math.log(VOCAB)] * 5, abs=1e-6)


def test_what_is_hidden_is_counted(runs) -> None:
    models = load_models([str(runs / name) for name in ("ar", "mdm", "blocks")], tag=None, context=CONTEXT)
    samples = open_samples(models, [str(runs / "valid")], number=1, cache_path=None)
    passes = {}
    for name, model in models.items():
        (passes[name],) = main_witness(model, pairs=4, batch_size=8).by_pass(samples.requests([0]))
        scores = main_witness(model, pairs=4, batch_size=8).scores(samples.requests([0]))
        own = passes[name]
        np.testing.assert_allclose((own.weights * own.logprobs).sum(0), scores[0].logprobs, atol=1e-9)
        np.testing.assert_allclose(own.chances.sum(0), 1)
    np.testing.assert_allclose(passes["ar"].hidden[0], (np.arange(24, 0, -1) - 0.5) / 24)
    masked = passes["mdm"].weights > 0
    np.testing.assert_allclose(passes["mdm"].hidden, np.repeat((masked.sum(1) - 0.5)[:, None] / 24, 24, axis=1))
    in_block = (passes["blocks"].weights > 0)[:, 4:9].sum(1)  # the first block holds the given token
    np.testing.assert_allclose(passes["blocks"].hidden[:, 4:9], np.repeat((in_block - 0.5)[:, None] / 5, 5, axis=1))


def test_both_sets_have_the_same_masks(runs) -> None:
    """The same texts in the place of both: no gap, however few masks."""
    models = load_models([str(runs / "mdm")], tag=None, context=CONTEXT)
    samples = open_samples(models, [str(runs / "valid")], number=3, cache_path=None)
    one, other = (measure(models["mdm"], samples, pairs=1, bins=2, batch_size=size) for size in (2, 8))
    assert Point(1, 1.0, one, other).gap().value == pytest.approx(0, abs=1e-6)


def test_every_checkpoint_is_scored_once_and_kept(runs, monkeypatch, capsys) -> None:
    data = ["--train-data-path", str(runs / "train"), "--valid-data-path", str(runs / "valid"), "--num-mc", "1"]
    words = [str(runs / "ar"), str(runs / "mdm"), *data, "--bins", "2"]
    assert main([*words, "--load-tag", "global_step2"]) == 0
    assert main(words) == 0
    record = Generalisation.load(runs / "mdm")
    assert record is not None
    assert [point.step for point in record.points] == [2, 4]
    assert record.protocol.label == "NLL bound" and record.protocol.estimator == "bound, 2 passes"
    assert record.protocol.seen["samples"] <= record.protocol.unseen["samples"]
    gap = record.points[1].gap()
    said = capsys.readouterr().out
    assert "mdm: NLL bound, 2 passes, nats per token, ± 95 %; seen: " in said
    assert said.splitlines()[-1].split()[0] == "4" and f"{gap.value:.4f} ± " in said.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr("megatron.evaluation.generalisation.measure", None)
        assert main(words) == 0, "nothing is scored twice"
    assert main([*words, "--load-tag", "global_step4", "--samples", "2"]) == 0
    record = Generalisation.load(runs / "mdm")
    assert record is not None and [point.step for point in record.points] == [4], "other samples begin another record"
    assert sorted(file.name for file in (runs / "mdm/generalisation").iterdir()) == ["4.npz", "record.json"]


def test_averaged_weights_are_scored_where_asked_for(runs, tmp_path, capsys) -> None:
    config = tiny.config_for("ar", runs / "tokenizer", vocab_size=VOCAB, seq_length=SEQ)
    kinds = {kind: tiny.random_tensors(config, seed=seed, scale=2.0) for seed, kind in enumerate(("weight", "ema"))}
    tiny.make_averaged_run(write_run(tmp_path / "run", "ar", validations=1), config, kinds)
    tiny.make_averaged_run(write_run(tmp_path / "other", "ar", validations=1), config, {"weight": kinds["ema"]})
    data = ["--train-data-path", str(runs / "train"), "--valid-data-path", str(runs / "valid")]
    losses = {}
    for name, kind in (("run", "weight"), ("run", "ema"), ("other", "weight")):
        main([str(tmp_path / name), *data, "--load-kind", kind])
        record = Generalisation.load(tmp_path / name)
        assert record is not None and record.protocol.weights == kind
        losses[name, kind] = record.points[0].loss("unseen").value
    assert losses["run", "ema"] == losses["other", "weight"] != losses["run", "weight"]
    assert capsys.readouterr().out.count("NLL (exact), averaged weights") == 1
    with pytest.raises(UserError, match="--load-kind"):
        main([str(tmp_path / "other"), *data, "--load-kind", "ema"])


def test_epochs_are_those_of_the_tokens_that_were_trained_on(runs, tmp_path) -> None:
    """They were samples times the last sequence length, whatever it was before."""
    shutil.copytree(runs / "ar", tmp_path / "ar", ignore=shutil.ignore_patterns("generalisation"))
    tag = tmp_path / "ar" / "global_step2"
    own = {"tokens": 900, "tokens_before": 100, "epochs_before": 0.5, "unique_tokens": 400}
    write_manifest(tag, {**read_manifest(tag), **own})
    data = ["--train-data-path", str(runs / "train"), "--valid-data-path", str(runs / "valid")]
    assert main([str(tmp_path / "ar"), *data, "--load-tag", tag.name]) == 0
    record = Generalisation.load(tmp_path / "ar")
    assert record is not None and record.points[0].epoch == 2.5


def test_wrong_input_is_named(runs, tmp_path) -> None:
    with pytest.raises(UserError, match="no --valid-data-path"):
        main([str(runs / "ar")])
    with pytest.raises(UserError, match="--num-mc would have no effect on ar; an exact likelihood has no masks"):
        main([str(runs / "ar"), "--num-mc", "8"])
    with pytest.raises(UserError, match="no --train-data-path"):
        main([str(runs / "ar"), "--valid-data-path", str(runs / "valid")])
    for train, valid in (("train", "train"), ("valid", "valid")):
        data = ["--train-data-path", str(runs / train), "--valid-data-path", str(runs / valid)]
        with pytest.raises(UserError, match=r"the validation data .* are the training data .*; one set was seen"):
            main([str(runs / "ar"), *data])
    with pytest.raises(UserError, match="holds no checkpoint"):
        main([str(write_run(tmp_path / "none", validations=1))])
    with pytest.raises(UserError, match=r"has no run\.json"):
        main([str(tmp_path)])
