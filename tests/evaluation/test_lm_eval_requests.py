"""Requests of lm-eval: random streams of repeats, races only where the winner is all, refusals that end nothing, labels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from megatron.errors import UserError
from megatron.evaluation.lm_eval.base import rows_of
from megatron.evaluation.lm_eval.command import run_downstream
from megatron.evaluation.lm_eval.groups import stream_names
from megatron.evaluation.lm_eval.models import MegatronAR, MegatronMDM
from megatron.evaluation.lm_eval.tasks import attend, task_loader
from megatron.evaluation.requests import encode_request
from megatron.inference.model import load_model
from tests.evaluation import tiny


@pytest.fixture(scope="module")
def models(runs):
    return {name: load_model(run) for name, run in runs.items()}


def make(models, name: str, **options):
    return {"ar": MegatronAR, "mdm": MegatronMDM}[name](model=models[name], **options)


def write(path: Path, *items: dict) -> str:
    return str(tiny.write_jsonl(path, list(items)))


def evaluate(lm, *names: str, prepare=lambda task: None, **options) -> dict:
    loader = task_loader(names)
    load = loader.load

    def loaded(tasks):
        found = load(tasks)
        for task in found["tasks"].values():
            prepare(task)
        return found

    loader.load = loaded
    from lm_eval.evaluator import simple_evaluate  # seconds to load

    return simple_evaluate(lm, tasks=list(names), task_manager=loader, log_samples=True, bootstrap_iters=0, **options)


# Random streams

SAMPLED = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_repeats_have_texts_of_their_own_whatever_the_batch(models, name) -> None:
    texts = {}
    for batch_size in (1, 2, 8):
        request = Instance("generate_until", {}, ("Return the path", SAMPLED), 0, ("story", 4, 6))
        other = Instance("generate_until", {}, ("Return the path", SAMPLED), 0, ("story", 5, 1))
        lm = make(models, name, batch_size=batch_size)
        texts[batch_size] = lm.generate_until([request] * 6 + [other], disable_tqdm=True)
        assert lm.generate_until([other], disable_tqdm=True) == texts[batch_size][6:], "the item decides, not its place"
    assert len(set(texts[1])) == 7
    assert texts[1] == texts[2] == texts[8]
    seeded = make(models, name, seed=7).generate_until([request], disable_tqdm=True)
    assert seeded != texts[1][:1], "--seed reaches generated texts"


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_a_resumed_evaluation_keeps_repeats_apart(models, name, tmp_path) -> None:
    request = Instance("generate_until", {}, ("Return the path", SAMPLED), 0, ("story", 4, 6))
    plain = make(models, name).generate_until([request] * 6, disable_tqdm=True)
    first = make(models, name, cache_dir=str(tmp_path)).generate_until([request] * 3, disable_tqdm=True)
    resumed = make(models, name, cache_dir=str(tmp_path))
    generated = []
    complete = resumed.complete
    resumed.complete = lambda prompts, **options: (generated.append(len(prompts)), complete(prompts, **options))[1]
    assert resumed.generate_until([request] * 6, disable_tqdm=True) == plain
    assert first == plain[:3]
    assert sum(generated) == 3
    other_seed = make(models, name, cache_dir=str(tmp_path), seed=9)
    assert other_seed.generate_until([request], disable_tqdm=True) != plain[:1]


def test_repeats_of_a_task_differ(models, tmp_path) -> None:
    path = write(
        tmp_path / "story.jsonl", {"prompt": "Return the", "answer": "x"}, {"prompt": "Return the", "answer": "y"}
    )
    options = {"gen_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}}
    results = evaluate(make(models, "ar"), path, prepare=lambda task: task.set_config("repeats", 4), **options)
    texts = [text for sample in results["samples"]["story"] for text in sample["resps"][0]]
    assert len(texts) == len(set(texts)) == 8


def test_streams_are_named_by_task_item_and_repeat() -> None:
    one, other = (Instance("generate_until", {}, ("a", {}), 0, ("t", item, 2)) for item in (0, 1))
    lone = Instance("generate_until", {}, ("a", {}), 0)
    assert stream_names([one, other, one, lone]) == ["t/0/0/0", "t/1/0/0", "t/0/0/1", "text/a/0/0"]


# Races

QUESTION = {"query": "Return the path of", "choices": ["the file that is", "a list of all the"], "gold": 0}


def kinds(models, path: str, metrics: list[str] | None = None, **options) -> tuple[str, dict]:
    def prepare(task):
        if metrics is not None:
            task._metric_fn_list = dict.fromkeys(metrics)

    lm = make(models, "mdm", num_mc=16, **options)
    samples = evaluate(lm, path, prepare=prepare)["samples"]["question"]
    return lm.summary.as_dict()["question"]["estimator"], samples[0]


def test_only_metrics_of_the_winner_are_raced_for(models, tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "question.jsonl", QUESTION)
    assert kinds(models, path)[0].startswith("ranking: ")
    assert kinds(models, path, ["acc"])[0].startswith("ranking: ")
    for metrics in (["acc", "brier_score"], ["exact_match"], ["likelihood", "acc"], []):
        lm = make(models, "mdm", num_mc=16)
        loader = task_loader([path])
        (task,) = loader.load([path])["tasks"].values()
        task._metric_fn_list = dict.fromkeys(metrics)
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        lm.loglikelihood(task.instances, disable_tqdm=True)
        assert lm.summary.as_dict()["question"]["estimator"].startswith("bound: "), metrics
    assert kinds(models, path, adaptive=False)[0].startswith("bound: ")


def test_mutual_information_uses_unbiased_likelihoods(models, tmp_path) -> None:
    """Each is what the request alone gets: the unconditional ones are no rivals of the answers."""
    path = write(tmp_path / "question.jsonl", QUESTION)
    (task,) = task_loader([path]).load([path])["tasks"].values()
    task._metric_fn_list = {"acc_mutual_info": None, "acc": None}
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    assert [i.args[0] for i in task.instances] == [QUESTION["query"]] * 2 + [""] * 2
    lm = make(models, "mdm", num_mc=16)
    together = lm.loglikelihood(task.instances, disable_tqdm=True)
    alone = [lm.loglikelihood([instance], disable_tqdm=True)[0] for instance in task.instances]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)


def test_greedy_flags_of_answers_are_right(models) -> None:
    """The answer that greedy decoding gives is flagged among others, raced or not, alone or not."""
    lm = make(models, "mdm", num_mc=8)
    context = lm.tok_encode("Return the path of")
    from megatron.generation.diffusion import DiffusionSettings

    answer = None
    for length in (1, 2, 3):  # one that is encoded as it was decoded
        filled = lm.sampler.fill([[*context, *[lm.loaded.mask_id] * length]], settings=DiffusionSettings())[0]
        text = lm.tokenizer.decode(filled[len(context) :])
        if encode_request(lm.tokenizer, "Return the path of", text) == (context, filled[len(context) :]):
            answer = text
    assert answer is not None
    choices = [" the file", answer, " a list of"]
    requests = [Instance("loglikelihood", {}, ("Return the path of", c), i, ("t", 0, 1)) for i, c in enumerate(choices)]
    expected = [flag for r in requests for _, flag in lm.loglikelihood([r], disable_tqdm=True)]
    assert expected[1] is True
    assert [flag for _, flag in lm.loglikelihood(requests, disable_tqdm=True)] == expected
    for request in requests:
        request.ranking = task_ranking()
    assert [flag for _, flag in lm.loglikelihood(requests, disable_tqdm=True)] == expected


def task_ranking():
    from megatron.evaluation.adaptive import Ranking

    return Ranking()


# Refusals


def test_each_line_of_a_generation_task_has_its_own_arguments(models, tmp_path) -> None:
    items = [
        {"prompt": "Return the", "answer": "x", "until": "e", "max_gen_toks": 9},
        {"prompt": "Return the", "answer": "x", "until": ["a", "o"], "max_gen_toks": 5, "note": [1, {"b": None}]},
        {"prompt": "Return the", "answer": "x", "max_gen_toks": 7, "note": "of another type"},
    ]
    path = write(tmp_path / "story.jsonl", *items)
    samples = evaluate(make(models, "ar"), path)["samples"]["story"]
    arguments = [sample["arguments"][0][1] for sample in samples]
    own = [(a["until"], a["max_gen_toks"]) for a in arguments]
    assert own == [(["e"], 9), (["a", "o"], 5), (["\n"], 7)]
    lm = make(models, "ar")
    seen = []
    complete = lm.complete

    def watched(prompts, *, wanted, **options):
        seen.append((wanted.stop_strings, wanted.max_new_tokens))
        return complete(prompts, wanted=wanted, **options)

    lm.complete = watched
    evaluate(lm, write(tmp_path / "short.jsonl", *items[:2]))
    assert sorted(seen) == [(("a", "o"), 5), (("e",), 9)]
    samples = evaluate(lm, path, gen_kwargs={"max_gen_toks": 3})["samples"]["story"]
    assert [s["arguments"][0][1]["max_gen_toks"] for s in samples] == [3, 3, 3], "a flag stands above the lines"


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_requests_without_a_likelihood_are_refused_by_name_and_left_out(models, runs, tmp_path, capsys, name) -> None:
    path = write(
        tmp_path / "words.jsonl",
        {"context": "Return the", "continuation": " path"},
        {"context": "Return the", "continuation": ""},
        {"context": "", "continuation": ""},
        {"context": "  \n", "continuation": "path"},
        {"context": "", "continuation": "path of"},
    )
    results = tmp_path / f"{name}.json"
    flags = ["--load", str(runs[name]), "--task_list", path, "--results_path", str(results), "--log_samples"]
    assert run_downstream(flags) == 0
    shown = capsys.readouterr()
    assert "words: 3 items refused" in shown.out
    assert shown.err.count("refused: task words item") == 3
    written = json.loads(results.read_text())
    assert {item: reason.split(";")[0] for item, reason in written["refused"]["words"].items()} == {
        "1": "continuation '' is empty", "2": "continuation '' is empty", "3": "context '  \\n' is blank"
    }  # fmt: skip
    assert written["n-samples"]["words"]["effective"] == 2
    assert sorted(sample["doc_id"] for sample in written["samples"]["words"]) == [0, 4]
    label = "perplexity (upper bound),none" if name == "mdm" else "perplexity,none"
    logs = [sample["resps"][0][0][0] for sample in written["samples"]["words"]]
    assert written["results"]["words"][label] == pytest.approx(math.exp(-np.mean(logs)))


def test_an_item_with_no_room_is_refused_and_the_others_go_on(models, tmp_path, capsys) -> None:
    items = [{"prompt": "Return the", "answer": "x", "max_gen_toks": n} for n in (4, 64, 5)]
    lm = make(models, "mdm")
    samples = evaluate(lm, write(tmp_path / "story.jsonl", *items))["samples"]["story"]
    assert [sample["doc_id"] for sample in samples] == [0, 2]
    assert list(lm.refusals.reasons["story"]) == ["1"]
    assert "share 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_an_empty_text_counts_nothing_and_blank_ones_are_scored(models, tmp_path, name) -> None:
    """As lm-eval's hf model: no window, log-likelihood 0."""
    texts = ["", "Return the path of the file.", " \n ", ""]
    lm = make(models, name, **({"num_mc": 4} if name == "mdm" else {}))
    results = evaluate(lm, write(tmp_path / "texts.jsonl", *({"text": text} for text in texts)))
    values = [sample["resps"][0][0] for sample in results["samples"]["texts"]]
    assert values[0] == values[3] == 0.0
    assert values[1] < -1 and values[2] < 0
    size = sum(len(text) for text in texts)
    assert results["results"]["texts"]["byte_perplexity,none"] == pytest.approx(math.exp(-sum(values) / size))
    with pytest.raises(UserError, match="empty texts only"):
        task_loader(["x.jsonl"]).load([write(tmp_path / "none.jsonl", {"text": ""})])


def test_a_tokenizer_without_end_of_document_refuses_only_what_needs_one(models, monkeypatch) -> None:
    lm = make(models, "ar")

    class Headless:
        eod_id, name = None, "headless"
        encode, decode = staticmethod(lm.tokenizer.encode), staticmethod(lm.tokenizer.decode)

    lm.tokenizer = Headless()
    requests = [Instance("loglikelihood", {}, (c, " path"), 0, ("t", i, 1)) for i, c in enumerate(["Return the", ""])]
    (value, _), (refused, flag) = lm.loglikelihood(requests, disable_tqdm=True)
    assert math.isfinite(value)
    assert (refused, flag) == (-math.inf, False)
    rolling = Instance("loglikelihood_rolling", {}, ("Return",), 0, ("r", 0, 1))
    assert lm.loglikelihood_rolling([rolling], disable_tqdm=True) == [-math.inf]
    empty = Instance("generate_until", {}, ("", {"until": [], "max_gen_toks": 2}), 0, ("g", 0, 1))
    assert lm.generate_until([empty], disable_tqdm=True) == [""]
    assert {task: list(reasons) for task, reasons in lm.refusals.reasons.items()} == {
        "t": ["1"],
        "r": ["0"],
        "g": ["0"],
    }


def test_an_empty_choice_is_scored_with_its_delimiter(models, tmp_path) -> None:
    path = write(tmp_path / "question.jsonl", {"query": "Return the", "choices": ["", "path"], "gold": 1})
    samples = evaluate(make(models, "ar"), path)["samples"]["question"]
    assert [arguments[1] for arguments in samples[0]["arguments"]] == [" ", " path"]
    assert all(math.isfinite(response[0][0]) for response in samples[0]["resps"])


@pytest.mark.parametrize(("given", "rows"), [(None, 32), ("auto", 32), ("auto:4", 32), ("4", 4), (7, 7)])
def test_batch_sizes_of_lm_eval(given, rows) -> None:
    assert rows_of(given) == rows
    assert rows_of(given, at_most=5) == min(rows, 5)


@pytest.mark.parametrize("given", ["0", -1, "many", "nan", 1e30])
def test_wrong_batch_sizes_are_refused(given) -> None:
    with pytest.raises(UserError, match="batch_size"):
        rows_of(given)


def test_attending_twice_is_harmless(tmp_path) -> None:
    (task,) = task_loader(["x.jsonl"]).load([write(tmp_path / "question.jsonl", QUESTION)])["tasks"].values()
    attend(task).set_config("num_fewshot", 0)
    task.build_all_requests()
    assert [instance.ranking for instance in task.instances] == [task_ranking()] * 2
