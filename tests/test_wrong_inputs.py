"""What people get wrong, program by program: one message each, with the cure in it, and a status that scripts notice.

Every case runs in this process from an empty folder that ``world`` fills; status 2 is a wrong input, 1 a world that does not
play along. Other tests look at rules in depth; this list is about what a person sees.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron.commands import console
from megatron.commands.running import status_of
from megatron.data.prepare.writer import IndexedDatasetWriter

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
SHAPE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
DATA = "--train-data-path data/train --tokenizer-type NullTokenizer --vocab-size 500 "
TRAIN = f"train --objective mdm {SHAPE}{DATA}--micro-batch-size 2 --train-iters 2 "
BYTES = "--tokenizer-type ByteTokenizer "
PREPROCESS = f"data preprocess --output-prefix out {BYTES}--workers 1 "

# Command line → what its message holds. "| VARIABLE=value" stands before a command line that needs one.
CASES = {
    # training: flags
    "train --hiden-size 32": "did you mean --hidden-size?",
    TRAIN + "--lr 1e--4": "'1e--4' was given; it takes a number",
    TRAIN + "--train-samples 1,000": "such as 1000 or 1e3",
    TRAIN + "--seq-length 2k": "it takes a whole number; write such as",
    TRAIN + "--lr": "--lr has no value",
    TRAIN + "--lr -1e-4": "--lr is -0.0001; it must be in (0, 1000]",
    TRAIN + "--dropout 0.1": "did you mean --attention-dropout or --hidden-dropout?",
    TRAIN + "--bf-16": "did you mean --bf16?",
    TRAIN + "--objective mdn": "did you mean mdm?",
    TRAIN + "--normalization rms": "did you mean rmsnorm?",
    TRAIN + "--lr-decay-style cosin": "did you mean cosine?",
    TRAIN + "--tokenizer-type GPT2Tokenizer": "did you mean GPT2BPETokenizer?",
    TRAIN + "--model 7B": "did you mean 7M?",
    TRAIN + "--model 140": "did you mean 140M?",
    TRAIN + "--global-batch-size 9": "use 8",
    TRAIN + "--tensor-model-parallel-size 3": "use --tensor-model-parallel-size 1, 2, 4",
    TRAIN + "--tensor-model-parallel-size 2": "torchrun --nproc-per-node 2",
    TRAIN + "--train-epochs 3": "pass one of --train-samples",
    f"train {SHAPE}{DATA}": "pass one of --train-samples",
    TRAIN + "--hidden-size 30": "change one of them or pass --kv-channels",
    f"train {DATA}--train-iters 2": "pass --model 7M",
    TRAIN + "--min-lr 1": "lower --min-lr",
    TRAIN + "--lr-warmup-samples 100": "lower --lr-warmup-samples",
    TRAIN + "--save-best --save runs/x": "pass --valid-data-path",
    TRAIN + "--save-interval 5": "it needs --save",
    TRAIN + "--train-iter 2": "did you mean --train-iters?",
    TRAIN + "--train-iters 1e15": "and at most 1e+15 samples; change its length",
    TRAIN + "--train-iters 1e14": "it is made in memory, of which this machine has",
    TRAIN + "--distributed-timeout-minutes 525600": "it must be in [0.1, 30000]",
    # training: data
    f"train {SHAPE}--train-iters 2 --train-data-path data/trian {BYTES}": "did you mean data/train?",
    f"train {SHAPE}--train-iters 2 --train-data-path data/train_text {BYTES}": "data/train_text_document",
    f"train {SHAPE}--train-iters 2 --train-data-path data {BYTES}": "data/train",
    f"train {SHAPE}--train-iters 2 --train-data-path notes.txt {BYTES}": "tools/preprocess_data.py",
    f"train {SHAPE}--train-iters 2 --train-data-path text.jsonl {BYTES}": "tools/preprocess_data.py",
    f"train {SHAPE}--train-iters 2 --train-data-path c4_100m/gpt2tok_c4_100_text_document {BYTES}": "./download.sh",
    f"train {SHAPE}--train-iters 2 {BYTES}": "pass --train-data-path",
    f"train {SHAPE}--train-iters 2 --train-data-path half {BYTES}": "half.bin",
    f"train {SHAPE}--train-iters 2 --train-data-path 0.5 data/train 0.5 {BYTES}": "write for example 0.3 path/a 0.7 path/b",
    TRAIN + "--valid-data-path data/train": "tools/split_data.py",
    TRAIN + "--vocab-size 100": "ids must be below",
    # training: tokenizers
    f"train {SHAPE}--train-iters 2 --train-data-path data/train --tokenizer-model empty": "tokenizer.json",
    f"train {SHAPE}--train-iters 2 --train-data-path data/train --tokenizer-model gpt22": "gpt22",
    f"train {SHAPE}--train-iters 2 --train-data-path data/train --vocab-file nowhere.json --merge-file m.txt": "nowhere.json",
    f"train {SHAPE}--train-iters 2 --train-data-path data/train": "tokenizer",
    # training: folders
    TRAIN + "--load empty": "empty",
    TRAIN + "--load nowhere": "nowhere",
    TRAIN + "--load run --load-tag global_step7": "global_step5",
    TRAIN + "--load run": "use the tokenizer of the checkpoint",
    TRAIN + "--save notes.txt/run": "choose another --save",
    TRAIN + "--save run": "--load run",
    TRAIN + "--deepspeed_config ds.json": "ds.json",
    # text to tokens
    PREPROCESS + "--input nothing.jsonl": "nothing.jsonl",
    PREPROCESS + "--input other.jsonl": "found: body, n; --json-keys",
    PREPROCESS + "--input other.jsonl --json-key body": "did you mean --json-keys?",
    PREPROCESS + "--input lines.jsonl": "--input-format text",
    PREPROCESS + "--input empty.jsonl": "holds no text",
    PREPROCESS + "--input text.jsonl --overwite": "did you mean --overwrite?",
    "data preprocess --input text.jsonl --output-prefix out": "--tokenizer-type",
    "data preprocess --input text.jsonl": "for example: megatron data preprocess",
    f"data preprocess --input text.jsonl --output-prefix data/train {BYTES}": "--overwrite",
    f"data preprocess --input text.jsonl --output-prefix notes.txt/out {BYTES}": "notes.txt",
    PREPROCESS + "--input text.jsonl --workers many": "whole number",
    "data split --input other.jsonl --output-dir sides": "--json-keys",
    "data split --input text.jsonl --output-dir sides --validation-fraction 5": "at most 0.5",
    "data split --input text.jsonl --output-dir notes.txt": "notes.txt",
    "data tokenizer --input other.jsonl --output tok": "found: body, n; --json-keys",
    "data subset --input data/trian --output small --documents 3": "did you mean data/train?",
    "data subset --input data/train --output small": "--documents",
    "data inspect data/train.bon": "data/train",
    # what a trained model is asked
    "generate --load nowhere --prompt x": "nowhere",
    "generate --load empty --prompt x": "empty",
    "generate --prompt x": "missing: --load; the program needs it; for example: megatron generate --load",
    "generate --load run --prompt x --temperature hot": "'hot'",
    "generate --load run --prompt x --max-new-tokens 0": "--max-new-tokens 0",
    "generate --load run --prompt x --order left": "one of confidence",
    "eval --task_list piqa": "pass --load",
    "eval --load run --estimator exactcount": "did you mean exact-count?",
    "eval --load empty --task_list questions.jsonl": "empty",
    # runs against each other
    "compare nowhere": "nowhere",
    "compare empty": "run.json",
    "report notes.txt": "notes.txt",
    "report --serve run": "RUN --serve",
    "report run --fits notes.txt": "notes.txt",
    "fit run --law chinchila": "did you mean chinchilla?",
    "fit empty": "run.json",
    "sweep nowhere.yaml list": "nowhere.yaml",
    "sweep sweep.yaml list": "sweep.yaml",
    "sweep sweep.yaml go": "one of list",
    "plan --unique-tokens 100M --flops 1e20 --gpu-hours 3": "drop one of them",
    "plan --unique-token 100M --flops 1e20": "did you mean --unique-tokens?",
    "plan --unique-tokens 100M --flop 1e20 --size 7M": "'--flop' (did you mean --flops?), '--size' (did you mean --sizes?)",
    "data split --input text.jsonl --output-dir sides --json-keys text body": "'body' behind --json-keys; that flag takes",
    "plan --unique-tokens 100MB --flops 1e20": "write 100M or 1e8",
    "plan --unique-tokens 100M --gpu-hours 5 --device H10": "did you mean H100?",
    # in and out
    "convert to-hf empty out": "empty",
    "convert tohf run out": "did you mean to-hf?",
    "convert from-hf empty out": "config.json",
    "convert from-published empty out": "--objective",
    "hub push empty owner/name --dry-run": "empty",
    "hub push run name --dry-run": "owner/name",
    "hub download --quickstat": "did you mean --quickstart?",
    "doctor --with tests": "did you mean test?",
    "trian": "megatron train",
    "data": "megatron data sample",
}

# Outputs where nobody can write: the input is right, the world is not.
REFUSED = {
    "report run --output /sys/report": "/sys/report",
    f"data preprocess --input text.jsonl --output-prefix /sys/out {BYTES}--workers 1": "/sys/out",
    "data split --input text.jsonl --output-dir /sys/sides": "/sys/sides",
}
# Scripts: environment and command line.
SCRIPTS = {
    "TEXT=nowhere bash examples_scaling/quickstart/laptop.sh": "check the name",
    "LAUNCHER=mpirun bash examples_scaling/training/ar/140m_100M.sh --dry-run": "unset LAUNCHER",
    "HOSTFILE=nowhere bash examples_scaling/training/ar/140m_100M.sh --dry-run": "check the name",
    "NNODES=2 LAUNCHER=python bash examples_scaling/training/ar/140m_100M.sh --dry-run": "unset LAUNCHER",
    "bash install.sh --wiht eval": "see --help",
    "bash install.sh --with": "use --with eval,test",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name in ("empty", "data"):
        (folder / name).mkdir()
    random = np.random.default_rng(0)
    for name in ("train", "valid", "train_text_document"):
        with IndexedDatasetWriter(folder / "data" / name, np.dtype(np.uint16)) as writer:
            for size in random.integers(20, 40, 20):
                writer.add_document(random.integers(0, 499, size).astype(np.uint16))
    shutil.copy(folder / "data/train.idx", folder / "half.idx")
    shutil.copytree(GOLDEN / "run_v1/mdm", folder / "run")
    (folder / "notes.txt").write_text("Some notes.\n")
    (folder / "lines.jsonl").write_text("This is no JSON.\nNor is this.\n")
    (folder / "empty.jsonl").touch()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 40}) + "\n" for i in range(30)))
    (folder / "other.jsonl").write_text(
        "".join(json.dumps({"body": f"document {i}", "n": i}) + "\n" for i in range(30))
    )
    (folder / "ds.json").write_text("{")
    (folder / "sweep.yaml").write_text("grid: [1, 2\n")
    return folder


@pytest.mark.parametrize("line", CASES)
def test_one_message_with_the_cure(
    line: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    status = status_of(lambda: console.main(line.split()))
    told = capfd.readouterr().err
    assert status == 2, told
    first, *more = told.splitlines()
    assert first.startswith("error: ") and told.count("error: ") == 1, told
    assert all(row.startswith("  ") for row in more), "further lines are places in a file"
    assert "Traceback" not in told
    assert CASES[line] in told, told


@pytest.mark.parametrize("line", REFUSED)
def test_a_world_that_refuses_is_status_1(
    line: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    assert status_of(lambda: console.main(line.split())) == 1
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and REFUSED[line] in told, told


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_script_says_it_in_one_line(line: str) -> None:
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2), done
    assert done.stderr.count("error: ") == 1 and done.stderr.count("\n") == 1, done.stderr
    assert SCRIPTS[line] in done.stderr


def test_the_list_is_long() -> None:
    assert len({*CASES, *REFUSED, *SCRIPTS}) >= 60
    cures = [*CASES.values(), *SCRIPTS.values()]
    assert all(cures), "an empty cure is in every message"
