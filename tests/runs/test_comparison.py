"""Overfitting, gaps and conclusions. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron.runs.comparison import comparisons, conditioning_gap, gap_between, overfitting, plus_minus, summary_row
from megatron.runs.conclusion import conclusion
from megatron.runs.crossing import crossing
from megatron.runs.reading import find_runs, load_run
from megatron.runs.run import Run
from megatron.runs.sums import halves as split_halves
from megatron.runs.sums import load_sums
from megatron.scaling.sweep.search import curve_of
from megatron.statistics import ValidationSums, mean_loss
from runs.synthetic_runs import write_run, write_sums


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_run(folder / "ar", "ar", epochs=40), write_run(folder / "mdm", "mdm")


def test_overfitting_needs_a_rise_beyond_the_error(pair, tmp_path):
    ar, mdm = (overfitting(load_run(path)) for path in pair)
    assert ar is not None
    assert ar.rises
    assert 8 < ar.best.epoch < 22
    assert mdm is not None
    assert mdm.at_end
    assert not mdm.rises
    folder = write_run(tmp_path / "noisy", "ar", epochs=40)
    text = (folder / "metrics.jsonl").read_text().replace('"nll_se": 0.012', '"nll_se": 0.5')
    (folder / "metrics.jsonl").write_text(text)
    noisy = overfitting(load_run(folder))
    assert noisy is not None
    assert not noisy.rises


def test_conclusion_says_which_is_ahead_and_that_a_bound_is_one_sided(pair, tmp_path):
    text = " ".join(conclusion(find_runs(pair)))
    assert "AR is ahead" in text
    assert "upper bound" in text
    assert "not a matched pair" in text
    assert "far below the scale" in text
    better = write_run(tmp_path / "mdm", "mdm", parameters=900_000_000)
    text = " ".join(conclusion(find_runs([pair[0], better])))
    assert "MDM is ahead" in text
    assert "at least that" in text


def test_a_loss_that_is_no_likelihood_is_not_ranked(pair, tmp_path):
    runs = find_runs([*pair, write_run(tmp_path / "maskgit", "maskgit", parameters=9_000_000)])
    assert [second.objective for _, second in comparisons(runs)] == ["mdm"]
    assert any("no likelihood: maskgit" in text for text in conclusion(runs))


def test_summary_marks_bounds(pair):
    assert summary_row(load_run(pair[1]))["Perplexity"].startswith("≤")
    assert not summary_row(load_run(pair[0]))["Perplexity"].startswith("≤")
    assert summary_row(load_run(pair[1]))["Kind"] == "NLL bound (4 bernoulli draws)"


def test_a_model_of_blocks_reads_the_clean_text_too(pair, tmp_path):
    """As its training does, of which a token counts twice in C."""
    blocks = load_run(write_run(tmp_path / "blocks", "block_diffusion", epochs=20))
    costs = {run.objective: summary_row(run)["Scoring FLOPs per token"] for run in (load_run(pair[1]), blocks)}
    assert costs == {"mdm": "7.2e+06", "block_diffusion": "1.4e+07"}  # 2·N·4 draws, and 4·N·4


def test_plus_minus_shows_the_digits_of_the_error():
    assert plus_minus(3.71, 0.004) == "3.7100 ± 0.0040"
    assert plus_minus(3.71, float("nan")) == "3.710"


def test_differences_of_two_runs_are_paired_by_document(tmp_path):
    """Effects of documents are the same in both runs: 40 documents tell a gap that two errors added would not."""
    folders = [write_run(tmp_path / name, name, epochs=20) for name in ("ar", "mdm")]
    for folder in folders:
        write_sums(folder)
    ar, mdm = map(load_run, folders)
    gap = gap_between(ar, mdm)
    assert gap.how == "paired over 40 documents"
    assert gap.value == pytest.approx(mdm.best.nll - ar.best.nll, rel=1e-6)
    assert gap.error < 0.2 * ar.best.nll_se
    assert gap.is_real
    assert gap.reach > 1.96 * gap.error, "Student's t"
    text = " ".join(conclusion([ar, mdm]))
    assert "paired over 40 documents" in text
    assert "over validation documents" in text
    assert "samples" not in text
    assert summary_row(ar)["± over"] == "40 documents"
    turn = overfitting(ar)
    assert turn is not None
    assert turn.rises, "the two validations of one run are paired, too"


def test_a_flat_curve_seldom_seems_to_overfit(pair):
    """Of 200 runs whose 20 validations differ by chance alone at most 4 % are said to rise from the best on (one side of a 95 %
    interval): on the documents that chose the best it was 12 %."""
    random, rows, rising = np.random.default_rng(0), load_run(pair[1]).valid, 0
    base = replace(load_run(pair[0]), averaged=())
    documents, tokens = np.arange(60), np.full(60, 100)
    for _ in range(200):
        level, chosen = random.normal(3, 0.5, 60), random.random(60) < 0.5
        losses = level + 0.05 * random.normal(size=(20, 60))
        sums = [ValidationSums.collect(documents, documents, tokens, 100 * own).with_halves(chosen) for own in losses]
        valid = [replace(rows[0], step=step, nll=float(own.mean())) for step, own in enumerate(losses)]
        run = Kept(**{**vars(base), "valid": tuple(valid), "info": {**base.info, "sums": sums}})
        turn = overfitting(run)
        assert turn is not None and run.result is not None and run.result.chosen_apart
        rising += turn.rises
    assert rising <= 8


def test_the_best_of_equal_runs_is_not_ahead(pair):
    """Twenty AR runs and one of MDM that differ by chance alone: the best of the twenty is chosen on one half of the documents
    and compared on the other, so that at most 7 % of 200 comparisons show a difference; chosen on all it was 12 %."""
    random, rows, different = np.random.default_rng(1), load_run(pair[1]).valid, 0
    bases = [replace(load_run(path), averaged=()) for path in pair]
    documents, tokens = np.arange(60), np.full(60, 100)
    for _ in range(200):
        level, chosen, runs = random.normal(3, 0.5, 60), random.random(60) < 0.5, []
        for number in range(21):
            own = level + 0.05 * random.normal(size=60)
            sums = [ValidationSums.collect(documents, documents, tokens, 100 * own).with_halves(chosen)]
            base, row = bases[number == 20], replace(rows[0], step=0, nll=float(own.mean()))
            runs.append(Kept(**{**vars(base), "valid": (row,), "info": {**base.info, "sums": sums}}))
        [(first, second)] = comparisons(runs)
        different += gap_between(first, second).is_real
    assert different <= 14


class Kept(Run):
    """A run with the sums of its validations in ``info``, by step."""

    def sums(self, row):
        return self.info["sums"][row.step]


def test_old_records_say_that_their_error_is_over_samples(pair):
    text = " ".join(conclusion(find_runs(pair)))
    assert "over validation samples and noise draws, too small where samples share documents" in text
    assert "as if the runs were judged on different samples" in text
    assert summary_row(load_run(pair[0]))["± over"] == "160 samples"


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other(tmp_path):
    folder = write_run(tmp_path / "ar", "ar", epochs=20)
    write_sums(folder, shift=0.3, halves=True)
    run = load_run(folder)
    halves = [split_halves(run.sums(row)) for row in run.valid]
    chosen = min(range(len(halves)), key=lambda index: halves[index][0].loss.sum())
    report = halves[chosen][1]
    assert run.result is not None
    assert run.result.chosen_apart
    assert run.result.row.step == run.valid[chosen].step
    assert run.result.nll == pytest.approx(report.loss.sum() / report.tokens.sum())
    assert run.result.error_unit == "20 documents"
    assert "flatters" not in " ".join(conclusion([run]))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace(f'"nll": {run.valid[2].nll}', '"nll": null'))
    other = load_run(folder)
    assert other.result == run.result, "a validation that gave no number, and would not be chosen"
    assert np.array_equal(np.delete(curve_of(other).loss, 2), np.delete(curve_of(run).loss, 2)), (
        "nor changes how others are judged"
    )
    assert np.isnan(curve_of(other).loss[2])
    (folder / "metrics.jsonl").write_text(text)
    (folder / f"validations/step{run.valid[0].step:08d}.npz").unlink()
    whole = load_run(folder).result
    assert whole is not None
    assert not whole.chosen_apart, "without the sums of one validation nothing can be chosen apart"


def test_sums_of_another_number_are_not_used(tmp_path):
    """A file that a later validation left over, or that was copied, does not belong to the row."""
    folder = write_run(tmp_path / "ar", "ar", epochs=5)
    write_sums(folder)
    text = (folder / "metrics.jsonl").read_text()
    run = load_run(folder)
    assert run.sums(run.valid[-1]) is not None
    (folder / "metrics.jsonl").write_text(text.replace(f'"nll": {run.valid[-1].nll}', '"nll": 3.21'))
    run = load_run(folder)
    assert run.valid[-1].nll == 3.21
    assert run.sums(run.valid[-1]) is None


def test_what_scoring_rules_give_ar_is_stated_and_sized(pair, tmp_path):
    """(ln V − NLL)/S at most: V 500, S 128."""
    folder = write_run(tmp_path / "ar", "ar", epochs=5)
    info = json.loads((folder / "run.json").read_text())
    info["config"]["data"]["vocab_size"] = 500
    (folder / "run.json").write_text(json.dumps(info))
    ar, mdm = load_run(folder), load_run(pair[1])
    assert conditioning_gap(ar, mdm) == pytest.approx((np.log(500) - ar.best.nll) / 128)
    assert conditioning_gap(ar, ar) is None
    shifted = load_run(pair[1])
    shifted.info["config"]["objective"]["shifted_labels"] = True  # given the first token, as AR is
    assert conditioning_gap(ar, shifted) is None
    text = " ".join(conclusion([ar, mdm]))
    assert "tokens 1 to 128 of a sample given token 0, MDM on tokens 0 to 127 given nothing" in text


def test_samples_of_different_validation_data_are_not_paired(tmp_path):
    """Sample 3 of one set is not sample 3 of another."""
    folders = [write_run(tmp_path / name, name, epochs=20) for name in ("ar", "mdm")]
    for folder, data in zip(folders, ("one", "two")):
        write_sums(folder)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**row, "data": data} if row["kind"] == "valid" else row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
    ar, mdm = map(load_run, folders)
    for gap in (gap_between(ar, mdm), crossing(ar, mdm).end):
        assert gap is not None and "as if the runs were judged on different samples" in gap.how
        assert gap.error > ar.best.nll_se


def test_an_unknown_error_is_not_shown_as_zero(pair, tmp_path):
    folder = write_run(tmp_path / "mdm", "mdm")
    text = (folder / "metrics.jsonl").read_text().replace('"nll_se": 0.025', '"nll_se": null')
    (folder / "metrics.jsonl").write_text(text)
    ar, mdm = load_run(pair[0]), load_run(folder)
    gap = gap_between(ar, mdm)
    assert np.isnan(gap.error) and gap.reach == pytest.approx(2 * 0.012), "what is known counts"
    text = " ".join(conclusion([ar, mdm]))
    assert f"AR is ahead by {gap.value:.3f} nats/token, whose error is not known" in text


def test_what_is_said_of_the_end_is_of_the_checkpoint_that_was_chosen(tmp_path):
    """The selection half prefers the validation before the last one, all documents the last."""
    folder = write_run(tmp_path / "mdm", "mdm", epochs=20)
    write_sums(folder, halves=True)
    last, before = (load_run(folder).valid[place] for place in (-1, -2))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "valid" and row["step"] in (last.step, before.step):
            sums = load_sums(folder / row["sums"])
            by = (
                np.where(sums.in_selection, 0.0, -0.2)
                if row["step"] == last.step
                else np.where(sums.in_selection, -0.9, 0.9)
            )
            changed = replace(sums, loss=sums.loss + by * sums.tokens)
            changed.save(folder / row["sums"])
            row["nll"] = mean_loss(changed).value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(folder)
    assert run.best.step == last.step and run.result.row.step == before.step
    text = " ".join(conclusion([run]))
    assert f"at epoch {run.result.row.epoch:.3g} " in text and "still improving at the end" not in text
    assert overfitting(run).best.step == before.step
