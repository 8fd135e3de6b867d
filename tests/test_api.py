"""``import megatron``: its names, its errors and its page. README's example runs with the other documented commands."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from evaluation.tiny import build_tokenizer_file, config_for, make_run

import megatron
from megatron import api

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def leave_no_process_group() -> Iterator[None]:
    """One that trains keeps it to its end; the tests after these start without."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_api", REPO / "docs/make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs/api.md").read_text(encoding="utf-8") == module.page(), "python docs/make_api.py"


def test_the_names_are_few_and_all_there() -> None:
    assert len(megatron.__all__) <= 8
    functions = {
        name for name, value in vars(api).items() if inspect.isfunction(value) and value.__module__ == "megatron.api"
    }
    assert {name for name in functions if not name.startswith("_")} | {"UserError"} - {"require"} == set(
        megatron.__all__
    )
    assert set(megatron.__all__) <= set(dir(megatron))
    assert megatron.train is api.train
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        megatron.trian  # noqa: B018


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"modle": "7M", "save": "x"}, "unknown argument '--modle'"),
        ({"model": "7M", "lr": "fast", "save": "x"}, "'fast' was given; it takes a number"),
        ({"model": "7M", "train_iters": 1, "lr": -1, "save": "x"}, "--lr is -1"),
        ({"model": "7M", "train_iters": 1}, "flags without save"),
        (["--model", "7M", "--train-iters", "1", "--save", "x"], "no training data"),
        ("--model 7M --train-iters 1 --save 'a b' --zero-stage 7", "--zero-stage is 7"),
        ({"model": "7M", "help": True}, "--help"),
        ({"model": "7M", "train_iters": 1, "train_data_path": "absent", "save": "x"}, "absent"),
        (
            {"model": "7M", "train_iters": 1, "use_checkpoint_args": True, "load": "absent", "save": "x"},
            "--load absent",
        ),
        ({"model": "7M", "train_iters": 1, "dump_config": True, "save": "x"}, "--dump-config; this program prints"),
    ],
    ids=str,
)
def test_wrong_flags_are_raised_not_printed(
    flags: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(megatron.UserError) as error:
        megatron.train(flags)
    assert message in str(error.value)
    assert capsys.readouterr().err == ""


def test_processes_of_a_launcher_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(megatron.UserError, match="no training data"):
        megatron.train({"model": "7M", "num_attention_heads": 4, "tp_size": 2, "train_iters": 1, "save": "x"})


def test_training_is_for_the_main_thread() -> None:
    """Signals, which stop and save a run, reach no other one."""
    with ThreadPoolExecutor(1) as other, pytest.raises(megatron.UserError, match="main thread"):
        other.submit(megatron.train, {"model": "7M", "train_iters": 1, "save": "x"}).result()


def test_a_mapping_is_the_command_line_of_its_names() -> None:
    flags = {
        "model": "7M",
        "bf16": True,
        "use-checkpoint": None,
        "train_data_path": [0.5, Path("a"), 0.5, "b"],
        "swiglu": False,
    }
    words = "--model 7M --bf16 --train-data-path 0.5 a 0.5 b --swiglu False"
    assert api._words(flags) == words.split()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer_file(folder / "tokenizer")
    return {
        name: megatron.load_model(make_run(folder / name, config_for(name, tokenizer, vocab_size=600)))
        for name in ("ar", "mdm")
    }


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_a_model_is_asked(name: str, models: dict[str, Any]) -> None:
    import torch

    model = models[name]
    ids = torch.tensor([model.tokenizer.encode("Return the name")])
    logits = model.logits(ids)
    assert logits.shape == (1, ids.shape[1], 640)
    found = megatron.log_likelihood(model, " the name", context="Return", num_draws=4)
    assert found.kind == ("exact" if name == "ar" else "bound")
    if name == "ar":  # the chain rule, by hand
        first = ids.shape[1] - len(model.tokenizer.encode(" the name"))
        logp = logits[0].double().log_softmax(-1)
        expected = sum(float(logp[at - 1, ids[0, at]].detach()) for at in range(first, ids.shape[1]))
        assert found.value == pytest.approx(expected, abs=1e-4)
    long = megatron.log_likelihood(model, "Return the name of the file. " * 40, num_draws=2)
    assert long.value < found.value
    one = megatron.generate(model, "Return", max_new_tokens=3, temperature=1.0, seed=5)
    assert one == megatron.generate(model, ["Return"], max_new_tokens=3, temperature=1.0, seed=5)
    assert len(megatron.generate(model, ["a", "b"], max_new_tokens=2, num_samples=2, temperature=1.0)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, "did you mean max_new_tokens?"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"infix": "x"}, "--infix"),
        ({"temperature": "hot"}, "--temperature: .*'hot'"),
        ({"max_new_tokens": 2.5}, "--max-new-tokens: .*'2.5'"),
        ({"num_samples": [2, "b"]}, "--num-samples: .*'b'"),
        ({"stop": "a\ud800"}, "--stop .*text is UTF-8"),
        ({"tokens_per_step": 2}, "--tokens-per-step with .* a causal model"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, models: dict[str, Any]) -> None:
    with pytest.raises(megatron.UserError, match=message):
        megatron.generate(models["ar"], "Return", **options)


def test_options_are_flags(models: dict[str, Any]) -> None:
    from megatron.generation.command import _FOR_TEXT
    from megatron.generation.flags import build_generate_parser

    every = vars(build_generate_parser().parse_args(["--load", "x"])).keys()
    others = {"prompt", "prompt_file", "show_steps", "animate", "json", "load", "load_tag", "load_kind", "decoding", "dtype",
              "vocab_file", "merge_file", "tokenizer_model", "tokenizer_type"}  # fmt: skip
    assert every - others == _FOR_TEXT
    how = {"max_new_tokens": 8, "temperature": 1.0}
    (whole,) = megatron.generate(models["ar"], "Return", **how)
    stop = whole.text[3:5]  # one string of two letters, not two strings
    (cut,) = megatron.generate(models["ar"], "Return", stop=stop, **how)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert megatron.generate(models["ar"], "Return", stop=[stop, "-"], **how)[0].text in (
        cut.text,
        cut.text.split("-")[0],
    )
    assert megatron.generate(models["mdm"], "Return", tokens_per_step=4, infix="-x", **how)


def test_what_cannot_be_scored_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(megatron.UserError, match="continuation '' is empty"):
        megatron.log_likelihood(models["mdm"], "")
    with pytest.raises(megatron.UserError, match="num_draws 0"):
        megatron.log_likelihood(models["mdm"], "x", num_draws=0)


def test_texts_that_are_none_are_refused(models: dict[str, Any]) -> None:
    for text, message in (
        (5, "prompt 5; it is text"),
        (None, "prompt None; it is text"),
        ("a\ud800", "lone surrogates"),
    ):
        with pytest.raises(megatron.UserError, match=message):
            megatron.generate(models["mdm"], text)  # type: ignore[arg-type]
        with pytest.raises(megatron.UserError, match=message.replace("prompt", "text")):
            megatron.log_likelihood(models["ar"], text)  # type: ignore[arg-type]
        with pytest.raises(megatron.UserError, match=message.replace("prompt", "context")):
            megatron.log_likelihood(models["ar"], "x", context=text)  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", ["runs/ar", ["runs/ar", "runs/mdm"], Path("runs/ar"), None, 3], ids=repr)
def test_paths_are_not_compared_but_the_way_is_named(runs: Any) -> None:
    with pytest.raises(megatron.UserError, match=r"it takes runs; write compare\(find_runs\("):
        megatron.compare(runs)


def test_a_list_of_places_is_refused_with_the_way_to_pass_it() -> None:
    with pytest.raises(megatron.UserError, match=r"find_runs\(\*PATHS\)"):
        megatron.find_runs(["runs/ar", "runs/mdm"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model '7M", "quoted as in a shell"),
        (None, "it takes flags by name, or a command line"),
        (5, "it takes flags by name, or a command line"),
        ({"save": "a\0b", "model": "7M"}, r"no command line holds that character; remove it"),
    ],
)
def test_what_is_no_command_line_is_refused(flags: Any, message: str) -> None:
    with pytest.raises(megatron.UserError, match=message):
        megatron.train(flags)
