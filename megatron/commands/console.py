"""The ``megatron`` command: one verb for each program of this project, from any folder."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from megatron import __version__
from megatron.commands.running import run
from megatron.errors import UserError

# Verb → module of this package, and a line about it; in the order of a project's life.
VERBS = {
    "doctor": ("doctor", "what is installed, what is missing, and how to get it"),
    "data sample": ("sample_corpus", "text that every machine has, for a first run"),
    "data tokenizer": ("train_tokenizer", "train a byte-level BPE tokenizer on text"),
    "data preprocess": ("preprocess", "text to token files (.bin, .idx)"),
    "data split": ("split", "own text into training and validation, without leakage"),
    "data subset": ("subset", "a smaller data set of whole documents"),
    "data inspect": ("inspect_data", "tokens, lengths, duplicates and integrity of a data set"),
    "train": ("pretrain", "train, or validate (--objective ar, mdm, ...)"),
    "eval": ("downstream", "score a checkpoint on downstream tasks"),
    "likelihood": ("likelihood", "every likelihood of several models, and a verdict"),
    "generate": ("generate", "text from a checkpoint"),
    "report": ("report", "runs as one HTML page with figures"),
    "compare": ("compare", "runs against each other, as text"),
    "compare-estimators": ("compare_estimators", "likelihood estimators of a checkpoint"),
    "import": ("import_runs", "runs of others: tables and TensorBoard logs"),
    "sweep": ("sweep", "a grid of runs, here or on SLURM"),
    "fit": ("fit", "scaling laws fitted to runs"),
    "plan": ("plan", "objective, size and epochs for given data and compute"),
    "convert": ("convert", "checkpoints of others to ours and back"),
    "hub download": ("download", "data sets, tokenizer and checkpoints of the paper"),
    "hub push": ("push", "upload a checkpoint with a model card"),
    "benchmark": ("benchmark", "tokens/s, TFLOP/s, MFU and memory of a preset and layout"),
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Start what the verb names with the words after it.

    Args:
        arguments: words after ``megatron``; default: those of the process.

    Returns:
        Exit status; None is 0.

    Raises:
        UserError: there is no such verb.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"megatron-mdm {__version__}")
        return 0
    verb = next((name for name in (" ".join(words[:2]), words[0]) if name in VERBS), None)
    if verb is None:
        raise UserError(f"megatron {' '.join(words[:2])}", f"the verbs are {', '.join(VERBS)}", _suggestion(words))
    sys.argv = [f"megatron {verb}", *words[len(verb.split()) :]]
    return import_module(f"megatron.commands.{VERBS[verb][0]}").main()


def usage() -> str:
    """What ``megatron --help`` prints, in 80 columns."""
    lines = [f"  {verb:<19} {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(["usage: megatron VERB [flags]      (megatron VERB --help lists them)", "", *lines])


def _suggestion(words: Sequence[str]) -> str:
    for given in (" ".join(words[:2]), words[0]):
        near = difflib.get_close_matches(given, VERBS, n=1) or [verb for verb in VERBS if verb.startswith(f"{given} ")]
        if near:
            return f"did you mean megatron {near[0]}?"
    return "see megatron --help"


def entry() -> NoReturn:
    """The console entry: run, and leave with the status."""
    run(main)
