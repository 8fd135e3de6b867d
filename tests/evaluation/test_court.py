"""The court: what it scores, that it goes on where it was, and when it decides."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron.commands.convert import main as convert
from megatron.commands.likelihood import main, report
from megatron.data.dataset import build_dataset
from megatron.errors import UserError
from megatron.evaluation.bench import load_models
from megatron.evaluation.court import BOUND, EXACT, MIXTURE, Court, Finding, Samples, hear
from megatron.evaluation.estimators import LeftToRight, MaskedBound
from megatron.evaluation.exact import TokenScores
from megatron.evaluation.requests import ResultCache
from megatron.evaluation.scorer import CausalScorer, MaskedScorer, Request
from megatron.inference.model import load_model
from megatron.parallel.context import Axis, ParallelContext
from megatron.randomness import VALIDATION_SEED
from megatron.runs.likelihoods import FLOOR, Likelihoods, Value
from megatron.statistics import ValidationSums
from tests.evaluation import tiny

SEQ, VOCAB = 24, 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("court")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", VOCAB)
    for name in ("ar", "mdm"):
        config = tiny.config_for(name, tokenizer, vocab_size=VOCAB, seq_length=SEQ)
        tiny.make_run(folder / name, config, scale=2.0)
    tiny.write_samples(folder / "valid", vocab_size=VOCAB, seq_length=SEQ, count=6)
    return folder


def judge(runs, *flags: str, output="out.json") -> dict:
    words = [str(runs / "ar"), str(runs / "mdm"), "--valid-data-path", str(runs / "valid"), *flags]
    assert main([*words, "--output", str(runs / output)]) == 0
    record = json.loads((runs / output).read_text())
    assert [vars(own) for own in Likelihoods.load(runs / output).findings] == record["findings"]
    return record


class Chosen:
    """A witness whose every token is a near tie."""

    name, kind, draws = "chosen", EXACT, 0

    def scores(self, requests):
        return [TokenScores(np.full(len(own.target), -1.0), np.full(len(own.target), True)) for own in requests]

    def passes(self, num_tokens: int) -> int:
        return 1


def test_tensor_parallel_peers_count_a_sample_once() -> None:
    tokens, documents = np.ones((2, 2, 5), dtype=np.int64)
    samples = Samples(tokens, documents - 1, np.array([True]))
    context = SimpleNamespace(dp=Axis(), tp=Axis(size=2), gather_objects=lambda found: [found] * 2)
    cache = ResultCache(None, fingerprint="")
    found = hear(Chosen(), samples, model="mdm", cache=cache, context=context, chunk=1)  # type: ignore[arg-type]
    assert (found.near_ties, found.sums.tokens.sum()) == (8, 8)


def test_every_likelihood_of_both_models_on_the_same_tokens(runs, capsys) -> None:
    """Values against scorers that know nothing of documents; padding rows have no share of the softmax."""
    dataset = build_dataset(
        [str(runs / "valid")], num_samples=None, seq_length=SEQ, seed=VALIDATION_SEED, name="valid", cache_path=None
    )
    found = judge(runs, "--policies", "left-to-right,confidence", "--num-mc", "2", "--orders", "3")
    values = {(own["model"], own["estimator"]): own["nll"] for own in found["findings"]}
    kinds = [own["kind"] for own in found["findings"]]
    assert kinds == [EXACT, BOUND, MIXTURE, EXACT, EXACT]
    assert [own["passes"] for own in found["findings"]] == [1, 4, 69, 23, 23]
    assert [own["near_ties"] for own in found["findings"][:4]] == [0] * 4, "their order is not the model's choice"
    assert {own["tokens"] for own in found["findings"]} == {found["samples"] * (SEQ - 1)}
    count = found["samples"]
    assert count == len(dataset) >= 6
    rows = [dataset[index][:SEQ].tolist() for index in range(count)]
    requests = [Request((row[0],), tuple(row[1:]), str(index)) for index, row in enumerate(rows)]
    for name in ("ar", "mdm"):
        model = load_model(runs / name)
        closed = [*model.unused_ids, *([model.mask_id] if model.is_masked else [])]

        def logits(ids, *, positions=None, model=model, closed=closed):
            found = model.logits(ids, positions=positions).clone()
            found[..., closed] = -math.inf
            return found

        if name == "ar":
            expected = {"chain rule": CausalScorer(logits, max_length=SEQ).score(requests)}
        else:
            scorer = MaskedScorer(logits, mask_id=model.mask_id, max_length=SEQ)
            expected = {
                "bound, 4 passes": scorer.score(requests, MaskedBound(antithetic=True), num_draws=2),
                "left-to-right, 1 token a pass": scorer.score(requests, LeftToRight(), num_draws=1),
            }
        for estimator, estimates in expected.items():
            mean = -sum(estimate.value for estimate in estimates) / (count * (SEQ - 1))
            assert values[name, estimator] == pytest.approx(mean, abs=2e-5), estimator
    assert "mdm below ar:" in capsys.readouterr().out


def test_finished_samples_are_not_scored_again(runs, monkeypatch) -> None:
    first = judge(runs, "--policies", "random", output="again.json")
    for name in (
        "scorer.CausalScorer.token_logprobs",
        "scorer.MaskedScorer.extend",
        "exact.PolicyScorer.token_scores",
    ):
        monkeypatch.setattr(f"megatron.evaluation.{name}", not_called)
    second = judge(runs, "--policies", "random", output="again.json")
    for one, own in zip(first["findings"], second["findings"]):
        assert one["nll"] == own["nll"]
    assert first["verdicts"] == second["verdicts"]


def test_a_damaged_line_of_the_cache_is_scored_again(runs) -> None:
    first = judge(runs, "--policies", "random", output="damaged.json")
    (file,) = (runs / "damaged.json.cache").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for row, value in zip(lines, ("junk", [[1]], 3, {}, [])):
        row["value"] = value
    file.write_text("\n".join(map(json.dumps, lines))[:-30])
    second = judge(runs, "--policies", "random", output="damaged.json")
    assert [own["nll"] for own in second["findings"]] == pytest.approx(
        [own["nll"] for own in first["findings"]], abs=1e-5
    )


def test_narrow_choices_are_counted_said_and_recorded(runs, monkeypatch, capsys) -> None:
    """With a limit so wide that most choices are narrow; also of samples that were scored before."""
    for module in ("generation.policies", "evaluation.court"):
        monkeypatch.setattr(f"megatron.{module}.NEAR_TIE", 0.05)
    flags = ("--policies", "left-to-right,confidence", "--num-mc", "1")
    for _ in range(2):
        found = judge(runs, *flags, output="narrow.json")
        assert found["near_tie_below"] == 0.05
        *known, chosen = found["findings"]
        assert [own["near_ties"] for own in known] == [0, 0, 0]
        assert chosen["tokens"] // 2 < chosen["near_ties"] < chosen["tokens"]
        line = f"  mdm, confidence, 1 token a pass: {chosen['near_ties']} of {chosen['tokens']} tokens"
        assert (
            f"chosen by a margin below 0.05, which another batch size or layout may turn:\n{line}\n"
            in capsys.readouterr().out
        )


def not_called(*arguments, **options) -> None:
    raise AssertionError("scored again")


def test_an_export_is_judged_as_its_run_is(runs) -> None:
    """The tokenizer of a masked model's export holds a mask token more; its text tokens are the same."""
    for name in ("ar", "mdm"):
        convert(["to-hf", str(runs / name), str(runs / f"{name}-hf")])
    words = [str(runs / name) for name in ("ar", "ar-hf", "mdm", "mdm-hf")]
    flags = ["--valid-data-path", str(runs / "valid"), "--policies", "confidence", "--num-mc", "1"]
    assert main([*words, *flags, "--output", str(runs / "exports.json")]) == 0
    found = {(own.model, own.estimator): own.nll for own in Likelihoods.load(runs / "exports.json").findings}
    assert len(found) == 6
    for (name, estimator), value in found.items():
        assert value == pytest.approx(found[name.removesuffix("-hf"), estimator], abs=1e-5)
    with pytest.raises(UserError, match="an export and --load-tag is latest; an export is one checkpoint"):
        main([str(runs / "ar-hf"), *flags[:2], "--load-tag", "latest"])


def test_a_run_is_called_by_its_folder_from_within_too(runs, monkeypatch) -> None:
    monkeypatch.chdir(runs / "ar")
    assert list(load_models([".", "../mdm"], tag=None, context=ParallelContext())) == ["ar", "mdm"]


def test_a_bracket_is_said_where_both_ends_are_known() -> None:
    ends = [
        Value("mdm", "64 orders, tangent", FLOOR, 4.11, 0.01, 0.02, 5, 64),
        Value("mdm", "64 orders in the logarithm", MIXTURE, 4.25, 0.02, 0.05, 5, 64),
    ]
    lines = report(Likelihoods(6, SEQ, ends, [], near_tie_below=0)).splitlines()
    assert lines[-1] == "mdm, drawn in random orders: 4.0900 ≤ NLL ≤ 4.3000 (95 %)"
    assert "≤" not in report(Likelihoods(6, SEQ, ends[1:], [], near_tie_below=0))


def finding(model: str, kind: str, losses: np.ndarray, witness: str = "w") -> Finding:
    """Losses [documents] of documents of 10 tokens, one a sample, half of them for choosing."""
    count = len(losses)
    sums = ValidationSums(np.arange(count), np.arange(count), np.full(count, 10), losses * 10.0)
    return Finding(model, witness, kind, 1, sums.with_halves(np.arange(count) % 2 == 0))


@pytest.fixture
def base() -> np.ndarray:
    return np.random.default_rng(1).normal(4.0, 0.5, 80)


def test_a_paired_difference_decides_where_the_errors_alone_would_not(base) -> None:
    noise = np.random.default_rng(2).normal(0.0, 0.01, 80)
    court = Court([finding("a", EXACT, base), finding("b", EXACT, base - 0.05 + noise)])
    (verdict,) = court.verdicts()
    assert (verdict.answer, verdict.basis, verdict.where) == ("yes", "exact values", "all documents")
    assert verdict.gap.value == pytest.approx(-0.05, abs=0.01)
    assert verdict.reach < 0.01 < 2 * verdict.first.value.error
    (other,) = Court([finding("a", EXACT, base), finding("b", EXACT, base + noise - noise.mean())]).verdicts()
    assert other.answer == "undecided at 95 %"


def test_a_bound_that_lies_above_decides_nothing(base) -> None:
    above, below = finding("b", BOUND, base + 0.2), finding("b", BOUND, base - 0.2)
    (verdict,) = Court([finding("a", EXACT, base), above]).verdicts()
    assert verdict.answer.startswith("undecided: w lies above")
    (verdict,) = Court([finding("a", EXACT, base), below]).verdicts()
    assert (verdict.answer, verdict.basis) == ("yes", "a bound")


def test_the_best_of_many_is_chosen_and_reported_on_different_documents(base) -> None:
    """Twenty policies that differ by chance alone: the chosen one does not look better than it is."""
    random = np.random.default_rng(3)
    policies = [finding("b", EXACT, base + random.normal(0, 0.3, 80), f"p{index}") for index in range(20)]
    (verdict,) = Court([finding("a", EXACT, base), *policies]).verdicts()
    assert verdict.where == "documents that no choice saw"
    assert verdict.answer == "undecided at 95 %"
    best = min(own.value.value for own in policies)
    assert best < finding("a", EXACT, base).value.value - 0.04


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokens-per-step", "0"], "--tokens-per-step 0"),
        (["--policies", "best"], "order 'best'"),
        (["--policies", "ancestral"], "order ancestral"),
        (["--policies", "margin, best"], "order 'best'"),
        (["--load-tag", "global_step77"], "global_step77"),
    ],
)
def test_wrong_input_is_named(runs, flags, named) -> None:
    with pytest.raises(UserError, match=named):
        judge(runs, *flags)


@pytest.mark.parametrize(
    "flags", [["--num-mc", "3"], ["--top-k", "1"], ["--policies", "random"], ["--orders", "2"]], ids=" ".join
)
def test_a_flag_that_no_model_heeds_is_refused(runs, flags) -> None:
    with pytest.raises(
        UserError, match=f"{flags[0]} would have no effect; .*ar.*: (none is masked|every likelihood is exact)"
    ):
        main([str(runs / "ar"), "--valid-data-path", str(runs / "valid"), "--samples", "1", *flags])


def test_texts_that_are_never_drawn_have_an_infinite_value_and_no_verdict(runs, capsys) -> None:
    found = judge(runs, "--policies", "left-to-right, confidence", "--top-k", "1", "--num-mc", "1", output="never.json")
    assert [own["nll"] for own in found["findings"][2:]] == [math.inf] * 2
    assert found["verdicts"][0]["second_below_first"] == "undecided at 95 %" and found["verdicts"][0]["gap"] == math.inf
    assert "left-to-right, 1 token a pass, top-k 1  exact        inf" in capsys.readouterr().out


def test_a_folder_is_no_output(runs, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--output .* it is a folder"):
        main(["/nowhere", "--output", str(tmp_path)])


def test_a_model_that_knows_single_documents_is_named(runs, tmp_path, capsys) -> None:
    config = tiny.config_for(
        "ar", runs / "tokenizer", vocab_size=VOCAB, seq_length=SEQ, reset_attention_mask=True, reset_position_ids=True
    )
    tiny.make_run(tmp_path / "apart", config)
    flags = ["--valid-data-path", str(runs / "valid"), "--samples", "2"]
    assert main([str(runs / "ar"), str(tmp_path / "apart"), *flags]) == 0
    ar, apart, *_ = capsys.readouterr().out.splitlines()
    assert "trained with" not in ar
    assert "(trained with --reset-position-ids --reset-attention-mask; scored here on whole samples" in apart


def test_runs_without_validation_data_or_with_other_tokens_are_refused(runs, tmp_path) -> None:
    with pytest.raises(UserError, match="no --valid-data-path"):
        main([str(runs / "ar")])
    other = tiny.config_for("mdm", runs / "tokenizer", vocab_size=VOCAB, seq_length=16)
    tiny.make_run(tmp_path / "short", other)
    with pytest.raises(UserError, match="short has samples of 16"):
        main([str(runs / "ar"), str(tmp_path / "short"), "--valid-data-path", str(runs / "valid")])
    # As many ids that mean something else, and ids that nobody has.
    tokenizer = tiny.build_tokenizer_file(tmp_path / "tokenizer", VOCAB + 20)
    text = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    other = tiny.config_for("mdm", tokenizer, vocab_size=VOCAB, seq_length=SEQ)
    tiny.make_run(tmp_path / "foreign", other)
    assert text != (runs / "tokenizer/tokenizer.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="ar, foreign have different tokenizers"):
        main([str(runs / "ar"), str(tmp_path / "foreign"), "--valid-data-path", str(runs / "valid")])
    many = tiny.write_samples(tmp_path / "many", vocab_size=VOCAB + 200, seq_length=SEQ, count=3)
    with pytest.raises(UserError, match="many"):
        main([str(runs / "ar"), "--valid-data-path", many])
