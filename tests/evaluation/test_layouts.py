"""Scores do not depend on the layout that saved the checkpoint, nor on the one that evaluates it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")


from megatron.checkpoint.files import Fragment
from megatron.checkpoint.writer import Saving
from megatron.commands.likelihood import main
from megatron.config.shape import Shape
from megatron.evaluation.lm_eval.tasks import task_loader
from megatron.model.gpt import GPTModel
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import shard_of
from tests.evaluation import tiny
from tests.evaluation.worker import COURT, MODELS

REPO = Path(__file__).resolve().parents[2]


def save_in_layout(folder: Path, config, *, tp_size: int, pieces: int) -> Path:
    """The checkpoint that ``tp_size`` tensor-parallel ranks write whose data-parallel peers (ZeRO) each hold a range.

    Pipeline stages only move whole tensors between files, which the reader never looks at by name.
    """
    specs = {shard.name: shard.spec for shard in map(shard_of, GPTModel(Shape.of(config.model)).parameters())}
    fragments = []
    for name, tensor in tiny.random_tensors(config, scale=3.0).items():
        for rank in range(tp_size if specs[name].dim is not None else 1):
            flat = specs[name].shard(tensor, rank, tp_size).reshape(-1)
            bounds = [len(flat) * piece // pieces for piece in range(pieces + 1)]
            ranges = itertools.pairwise(bounds)
            fragments += [Fragment("weight", name, rank, tp_size, start, flat[start:end]) for start, end in ranges]
    state = {"step": 3, "consumed_samples": 0, "optimizer_steps": 0, "config": config}
    Saving(folder, fragments=fragments, specs=specs, state=state, context=ParallelContext()).publish()
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("layouts")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 400)
    for name in MODELS:
        objective, options = ("block_diffusion", {"block_size": 8}) if name == "blocks" else (name, {})
        config = tiny.config_for(objective, tokenizer, vocab_size=400, seq_length=64, **options)
        tiny.make_run(folder / name, config, scale=3.0)
        save_in_layout(folder / f"{name}-tp2", config, tp_size=2, pieces=3)
    tasks = (
        str(tiny.write_jsonl(folder / "halves.jsonl", tiny.choice_items(7))),
        str(tiny.write_jsonl(folder / "words.jsonl", tiny.last_word_items(5))),
        str(tiny.write_jsonl(folder / "continue.jsonl", tiny.generation_items(3))),
    )
    tiny.write_samples(folder / "valid", vocab_size=400, seq_length=64, count=5)
    return folder, tasks


@cache  # what one process says of a run is asked twice
def reference(run: Path, tasks: tuple[str, ...]) -> dict:
    from lm_eval.evaluator import simple_evaluate  # seconds to load

    cls, options = MODELS[run.name.removesuffix("-tp2")]
    results = simple_evaluate(
        cls(load=str(run), **options),
        tasks=list(tasks),
        task_manager=task_loader(list(tasks)),
        log_samples=True,
        bootstrap_iters=0,
    )
    scores = {task: sorted((s["doc_id"], s["resps"]) for s in samples) for task, samples in results["samples"].items()}
    return json.loads(json.dumps(scores))


def assert_equal_scores(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for task in one:
        assert [doc for doc, _ in one[task]] == [doc for doc, _ in other[task]]
        for (_, mine), (_, theirs) in zip(one[task], other[task]):
            if task == "continue":  # lm-eval repeats an item where the ranks have unequal numbers of them
                assert [r[0] for r in mine] == [r[0] for r in theirs]
                continue
            assert [r[0][0] for r in mine] == pytest.approx([r[0][0] for r in theirs], abs=1e-4)
            assert [r[0][1] for r in mine] == [r[0][1] for r in theirs]


def test_the_saving_layout_changes_nothing(setup) -> None:
    folder, tasks = setup
    for name in MODELS:
        assert reference(folder / name, tasks) == reference(folder / f"{name}-tp2", tasks), "equal to the last bit"


def test_two_processes_give_the_scores_of_one(setup) -> None:
    """Data-parallel and tensor-parallel: tasks, every item once, and every likelihood of the court."""
    folder, tasks = setup
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.evaluation.worker", str(folder), *tasks]
    processes = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=REPO,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    for name in MODELS:
        single = reference(folder / name, tasks)
        for tp_size in (1, 2):
            written = json.loads((folder / f"{name}-tp{tp_size}.json").read_text())
            assert_equal_scores(written["scores"], single)
            assert written["answers"] == {"halves": 28, "words": 5}
        files = sorted(path.name for path in (folder / f"cache-{name}-2").iterdir())
        assert files == ["results-00000.jsonl"], "tensor-parallel peers write one file"
    both = f"3*{folder / 'ar'}+1*{folder / 'ar-tp2'}"
    judged = [*(folder / name for name in MODELS), both, "--valid-data-path", folder / "valid", "--num-mc", 2]
    for rows, name in ((32, ""), (2, "-rows2")):
        output = ["--output", str(folder / f"court{name}.json"), "--batch-size", str(rows)]
        assert main([*map(str, judged), *output, *COURT]) == 0
    layouts = ("", "-rows2", "-tp1", "-tp2")
    alone, *others = (json.loads((folder / f"court{name}.json").read_text()) for name in layouts)
    for found in others:
        assert len(found["findings"]) == 13
        for one, own in zip(alone["findings"], found["findings"]):
            assert own["nll"] == pytest.approx(one["nll"], abs=1e-5), own["estimator"]
            assert own["standard_error"] == pytest.approx(one["standard_error"], abs=1e-5)
    # Sample by sample: in nats a token, where no choice was so narrow that rounding may have turned it.
    alone, *others = (sample_scores(folder / f"court{name}.json.cache") for name in layouts)
    for found in others:
        assert found.keys() == alone.keys()
        for key, own in found.items():
            near = sum(entry[4] for entry in (*own, *alone[key]))
            for entry, expected in zip(own, alone[key]):
                assert near or entry[3] / entry[2] == pytest.approx(expected[3] / expected[2], abs=1e-5)
    narrow = [sum(entry[4] for entry in entries) > 0 for entries in alone.values()]
    assert sum(narrow) < len(narrow) // 6, "of one estimator, and not all of its samples"


def sample_scores(cache: Path) -> dict[str, list]:
    """Of every sample and estimator: (sample, document, tokens, loss, near ties) of its documents."""
    files = [file.read_text().splitlines() for file in sorted(cache.glob("*.jsonl"))]
    records = [json.loads(line) for lines in files for line in lines]
    assert len({record["key"] for record in records}) == len(records), "nothing is scored twice"
    return {record["key"]: record["value"] for record in records}
