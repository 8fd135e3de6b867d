"""The program that evaluates through lm-eval: labels in its table, numbers that it refuses, and lm-eval's own command."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from megatron.errors import UserError
from megatron.evaluation.lm_eval.command import finish_results, run_downstream
from megatron.evaluation.lm_eval.tasks import task_loader
from megatron.evaluation.requests import whole_number
from tests.evaluation import tiny

QUESTION = {"query": "Return the path of", "choices": ["the file that is", "a list of all the"], "gold": 0}


def write(path: Path, *items: dict) -> str:
    return str(tiny.write_jsonl(path, list(items)))


def test_perplexities_of_a_bound_are_called_upper_bounds(runs, tmp_path, capsys) -> None:
    path = write(tmp_path / "texts.jsonl", *({"text": text} for text in tiny.sentences()[:3]))
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    results = tmp_path / "r.json"
    flags = ["--task_list", path, "--results_path", str(results)]
    assert run_downstream(["--load", str(runs["mdm"]), "--num-mc", "4", *flags]) == 0
    shown, metrics = capsys.readouterr().out, json.loads(results.read_text())["results"]["texts"]
    for name in names:
        assert f"{name} (upper bound)" in shown
        assert f"{name} (upper bound),none" in metrics
        assert f"{name},none" not in metrics
    for flags_of in (["--load", str(runs["mdm"]), "--eval_method", "ar"], ["--load", str(runs["ar"])]):
        assert run_downstream([*flags_of, *flags]) == 0
        assert "upper bound" not in capsys.readouterr().out
        assert {f"{name},none" for name in names} <= set(json.loads(results.read_text())["results"]["texts"])


def test_races_are_labelled_in_the_table(runs, tmp_path, capsys) -> None:
    path = write(tmp_path / "question.jsonl", QUESTION)
    flags = ["--load", str(runs["mdm"]), "--task_list", path, "--num-mc", "16"]
    assert run_downstream(flags) == 0
    shown = capsys.readouterr().out
    assert "ranking: exact-count, stratified" in shown
    assert "biased otherwise" in shown
    assert run_downstream([*flags, "--no_adaptive"]) == 0
    shown = capsys.readouterr().out
    assert "bound: exact-count, stratified" in shown
    assert "biased" not in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gen_kwargs", "temperature=nan"], "temperature nan"),
        (["--gen_kwargs", "temperature=-1"], "temperature -1"),
        (["--gen_kwargs", "temperature=inf"], "temperature inf"),
        (["--gen_kwargs", "top_p=1.5"], "top_p 1.5"),
        (["--gen_kwargs", "top_k=-2"], "top_k -2"),
        (["--gen_kwargs", "top_k=2.5"], "top_k 2.5; it is a whole number"),
        (["--gen_kwargs", "steps=8.5"], "steps 8.5; it is a whole number"),
        (["--gen_kwargs", "temprature=1"], "did you mean temperature"),
        (["--gen_kwargs", "num_beams=4"], "generation argument 'num_beams'"),
        (["--gen_kwargs", "max_gen_toks=0"], "max_gen_toks 0"),
        (["--gen_kwargs", "max_gen_toks=many"], "generation arguments"),
        (["--gen_kwargs", "guidance=nan"], "guidance nan"),
        (["--gen_kwargs", "steps=1,block_length=2"], "128 blocks"),
        (["--num-mc", "0"], "num_mc 0"),
        (["--num-mc", "99999999999"], "num_mc"),
        (["--micro-batch-size", "0"], "batch_size 0"),
        (["--seq-length", "-4"], "max_length -4"),
        (["--seq-length", "0"], "max_length 0"),
        (["--num_fewshot", "1"], "--num_fewshot 1 with words, which has 1 items"),
        (["--seed", "-5"], "seed -5"),
        (["--tensor-model-parallel-size", "0"], "parallel-size 0"),
        (["--results_path", "."], "is a folder"),
    ],
)
def test_numbers_out_of_range_are_refused(runs, tmp_path, flags, message) -> None:
    if flags[0] == "--gen_kwargs":
        flags = [flags[0], flags[1] + ",do_sample=True"]
    path = write(tmp_path / "words.jsonl", {"context": "Return the", "continuation": " path"})
    with pytest.raises(UserError, match=message):
        run_downstream(["--load", str(runs["mdm"]), "--task_list", path, *flags])


@pytest.mark.parametrize("flags", [["--limit", "nan"], ["--limit", "0"], ["--limit", "1.5"], ["--num_fewshot", "-1"]])
def test_counts_of_items_are_refused_by_their_flag(flags) -> None:
    with pytest.raises(UserError, match=flags[0]):
        run_downstream(["--load", "x", *flags])


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_the_lm_eval_command_runs_without_cuda(runs, tmp_path, monkeypatch, capsys, name) -> None:
    """As in docs/evaluation.md: lm-eval itself asks for cuda:0."""
    import megatron.evaluation.__main__ as program

    write(
        tmp_path / "items.jsonl",
        {"context": "Return the", "continuation": " path"},
        {"context": " ", "continuation": "x"},
    )
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/items.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{continuation}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    words = ["lm_eval", "--model", f"megatron_{name}", "--model_args", f"load={runs[name]},max_length=4096",
             "--tasks", "words"]  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "argv", [*words, "--include_path", str(tmp_path), "--batch_size", "auto:4"])
    program.cli_evaluate()
    shown = capsys.readouterr()
    assert "|words|" in shown.out.replace(" ", "")
    assert shown.out.count("max_length 4096: rows have 64 tokens, as the model was trained with") == 1
    assert "refused: task words item 1" in shown.err


def test_the_mean_of_a_group_is_a_bound_where_one_of_its_tasks_is() -> None:
    metrics = {"bits_per_byte,none": 1.0, "acc,none": 0.5}
    found = {name: dict(metrics) for name in ("all", "news", "exact")}
    results = {"results": found, "groups": {"all": found["all"]}, "configs": {},
               "group_subtasks": {"all": ["texts", "exact"], "texts": ["news"], "news": []}}  # fmt: skip
    summary = {"news": {"estimator": "bound: exact-count"}, "exact": {"estimator": "exact: chain rule"}}
    flags = Namespace(only_generate=False, only_mc_nll=False)
    labelled = finish_results(results, summary, flags)
    assert labelled["results"]["all"] == {"bits_per_byte (upper bound),none": 1.0, "acc,none": 0.5}
    assert labelled["groups"]["all"] == labelled["results"]["all"]
    assert labelled["results"]["exact"] == metrics


def test_files_of_one_name_are_not_taken_for_one_task(tmp_path) -> None:
    item = {"context": "Return the", "continuation": " path"}
    (tmp_path / "other").mkdir()
    first, second = (write(tmp_path / folder / "words.jsonl", item) for folder in (".", "other"))
    with pytest.raises(UserError, match=r"words\.jsonl and .*words\.jsonl are both the task words"):
        task_loader([first, second]).load([first, second])
    assert list(task_loader([first]).load([first, first])["tasks"]) == ["words"]


@pytest.mark.parametrize("value", [2.5, True, "2.5", float("nan"), float("inf"), None])
def test_a_count_is_a_whole_number(value) -> None:
    with pytest.raises(UserError, match=r"num_mc .*; it is a whole number from 1"):
        whole_number("num_mc", value)
    assert [whole_number("num_mc", value) for value in (8, 8.0, "8")] == [8] * 3
