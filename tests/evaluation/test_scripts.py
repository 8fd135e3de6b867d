"""The example scripts of evaluation print commands that parse, and the published flags parse too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.evaluation.lm_eval.command import build_downstream_parser
from megatron.generation.command import build_generate_parser
from megatron.objectives import parse

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples_scaling"


def dry_run(script: Path, **environment: str) -> list[str]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(
        ["bash", str(script), "--dry-run"], capture_output=True, text=True, timeout=60,
        env={**clean, "VIRTUAL_ENV": sys.prefix, **environment}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


EXPECTED = {
    "downstream_arm.sh": {"eval_method": "ar", "only_generate": False, "only_mc_nll": False},
    "downstream_mdm.sh": {"eval_method": "ar", "only_generate": False, "only_mc_nll": False},
    "downstream_mdm_mc.sh": {"eval_method": "mc", "only_mc_nll": True, "num_mc": 128},
    "downstream_mdm_onlygen.sh": {"only_generate": True, "task_list": "lambada"},
}


def test_the_four_modes_are_there() -> None:
    assert sorted(path.name for path in (EXAMPLES / "downstream").glob("*.sh")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_downstream_scripts(name) -> None:
    words = dry_run(EXAMPLES / "downstream" / name, CHECKPOINT="/some run", LOAD_TAG="global_step7")
    at = next(i for i, word in enumerate(words) if word.endswith("tools/evaluate_downstream.py"))
    assert Path(words[at]).is_file()
    arguments = build_downstream_parser().parse_args(words[at + 1 :])
    assert (arguments.load, arguments.load_tag, arguments.eval_fp32) == ("/some run", "global_step7", True)
    for field, value in EXPECTED[name].items():
        assert getattr(arguments, field) == value


def test_validation_and_generation_scripts() -> None:
    for kind in ("ar", "mdm"):
        words = dry_run(EXAMPLES / "evaluation" / f"validate_{kind}.sh", CHECKPOINT="/run")
        at = next(i for i, word in enumerate(words) if Path(word).name.startswith("pretrain_"))
        config = parse(words[at + 1 :], objective=kind)
        assert (config.run.skip_train, config.run.eval_iters, config.run.load) == (True, "full", "/run")
    words = dry_run(EXAMPLES / "evaluation" / "generate.sh", PROMPT="a b")
    at = next(i for i, word in enumerate(words) if word.endswith("tools/generate.py"))
    assert build_generate_parser().parse_args(words[at + 1 :]).prompt == ["a b"]


VALUES = {"--eval_method": "mc", "--task_list": "copa", "--results_path": "r.json", "--normalization": "rmsnorm",
          "--data-impl": "mmap", "--lr-decay-style": "cosine", "--optimizer": "adam", "--vocab-file": "v",
          "--merge-file": "m"}  # fmt: skip
SWITCHES = {"--bf16", "--cpu-optimizer", "--deepspeed", "--disable-bias-linear", "--eval_fp32", "--inference",
            "--log-batch-size-to-tensorboard", "--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard",
            "--no-load-optim", "--no-load-rng", "--no-pipeline-parallel", "--only_generate", "--only_mc_nll", "--skip-train",
            "--swiglu", "--use-order-list", "--use-predefined-order", "--use-rotary-position-embeddings"}  # fmt: skip


def test_every_published_flag_parses() -> None:
    flags = (REPO / "tests/golden/facts/launch_flags.txt").read_text().split()
    for flag in flags:
        words = [flag] if flag in SWITCHES else [flag, VALUES.get(flag, "1")]
        arguments = build_downstream_parser().parse_args(words)
        assert len(vars(arguments)) > 0
    both = build_downstream_parser().parse_args(
        [w for f in flags for w in ([f] if f in SWITCHES else [f, VALUES.get(f, "1")])]
    )
    assert (both.eval_method, both.task_list, both.results_path, both.num_mc, both.load_tag) == (
        "mc",
        "copa",
        "r.json",
        1,
        "1",
    )
