"""Tiny real models (GPTModel, checkpoints, a BPE tokenizer) and tasks of real text from the standard library."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.tensors import model_tensors, save_full_checkpoint
from megatron.checkpoint.writer import Saving
from megatron.config import Config
from megatron.config.shape import Shape
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.model.gpt import GPTModel
from megatron.objectives import needs_mask_token, parse, with_vocabulary
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory

MODULES = ("argparse", "collections/__init__", "datetime", "difflib", "functools", "inspect", "ipaddress", "json/decoder",
           "logging/__init__", "os", "pathlib", "random", "shutil", "socket", "statistics", "subprocess", "tarfile",
           "textwrap", "threading", "unittest/case", "urllib/request", "zipfile")  # fmt: skip


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of 6 to 40 words from docstrings of the standard library, in a fixed order."""
    found = []
    for module in MODULES:
        path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
        if not path.is_file():  # a module that became a package in a later Python
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = " ".join((ast.get_docstring(node) or "").split())
                found += [s.strip() + "." for s in text.split(". ") if 6 <= len(s.split()) <= 40 and s.isascii()]
    return tuple(dict.fromkeys(found))


def build_tokenizer_file(folder: Path, vocab_size: int = 600) -> Path:
    """Train a byte-level BPE on the sentences and write ``folder/tokenizer.json`` for us and for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(sentences(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config_for(objective: str, tokenizer: Path, *, vocab_size: int, seq_length: int = 96, **model) -> Config:
    """A resolved configuration of a small model."""
    flags = ["--num-layers", "2", "--hidden-size", "48", "--num-attention-heads", "4", "--seq-length", str(seq_length)]
    flags += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tokenizer)]
    for name, value in model.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    config = parse([*flags, "--train-samples", "8"], objective=objective)
    padded = -(-(vocab_size + 1) // 128) * 128
    mask_id = vocab_size if needs_mask_token(objective) else None
    return dataclasses.replace(
        config,
        model=Shape.from_flags(config.model, padded_vocab_size=padded).recorded(),
        objective=with_vocabulary(config.objective, mask_id, size=vocab_size, padded=padded),
    )


def random_tensors(config: Config, *, seed: int = 0, scale: float = 6.0) -> dict[str, torch.Tensor]:
    """Initial weights, matrices enlarged so that predictions are far from uniform."""
    model = GPTModel(Shape.of(config.model), ParameterFactory(seed=seed))
    return {name: (t * scale if t.dim() > 1 else t).detach().clone() for name, t in model.tensors().items()}


def make_run(folder: Path, config: Config, *, seed: int = 0, step: int = 3, scale: float = 6.0) -> Path:
    """A run directory with one checkpoint of random weights."""
    save_full_checkpoint(folder, config, random_tensors(config, seed=seed, scale=scale), step=step)
    return folder


def make_averaged_run(
    folder: Path, config: Config, kinds: dict[str, dict[str, torch.Tensor]], *, step: int = 3
) -> Path:
    """A run directory with one checkpoint of ``kinds``: weights as trained and their average."""
    fragments = [
        Fragment(kind, name, 0, 1, 0, tensor.reshape(-1)) for kind, own in kinds.items() for name, tensor in own.items()
    ]
    state = {"step": step, "consumed_samples": 8, "optimizer_steps": step, "config": config}
    state |= {"average_updates": step} if "ema" in kinds else {}
    specs = model_tensors(config.model, num_tensors=99, source="")
    Saving(folder, fragments=fragments, specs=specs, state=state, context=ParallelContext()).publish()
    return folder


def choice_items(number: int, seed: int = 0) -> list[dict]:
    """Multiple choice: which half of a sentence follows."""
    rng, pool = random.Random(seed), [s for s in sentences() if len(s.split()) >= 10 and len(s) <= 180]
    items = []
    for index in range(number):
        own = pool[index % len(pool)].split()
        cut = len(own) // 2
        others = [s.split() for s in rng.sample(pool, 3)]
        choices = [
            " ".join(words[len(words) // 2 :][: len(own) - cut + rng.randint(-1, 1)]) for words in [own, *others]
        ]
        gold = rng.randrange(4)
        choices[0], choices[gold] = choices[gold], choices[0]
        before = " ".join(rng.sample(pool, 3)) + " " if index % 10 == 0 else ""  # too long for a small context
        items.append({"query": before + " ".join(own[:cut]), "choices": choices, "gold": gold})
    return items


def last_word_items(number: int) -> list[dict]:
    """LAMBADA kind: the last word of a sentence."""
    pool = [s for s in sentences() if len(s.split()) >= 8 and len(s) <= 180]
    return [
        {"context": " ".join(s.split()[:-1]), "continuation": " " + s.split()[-1]}
        for s in (pool[i % len(pool)] for i in range(number))
    ]


def generation_items(number: int) -> list[dict]:
    """Generation kind: the first words of a sentence, up to a full stop."""
    pool = [s for s in sentences() if len(s.split()) >= 8 and len(s) <= 180]
    return [
        {"prompt": " ".join(s.split()[:5]), "answer": " ".join(s.split()[5:]), "until": [".", "\n"], "max_gen_toks": 12}
        for s in (pool[i % len(pool)] for i in range(number))
    ]


def write_jsonl(path: Path, items: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def write_samples(prefix: Path, *, vocab_size: int, seq_length: int, count: int, seed: int = 0) -> str:
    """A data set of ``count`` samples and a little more, in documents of 5 to 40 random tokens."""
    random_tokens = np.random.default_rng(seed)
    sizes = []
    while sum(sizes) < count * seq_length + 1:
        sizes.append(int(random_tokens.integers(5, 41)))
    with IndexedDatasetWriter(str(prefix), np.int32) as writer:
        writer.add_documents(random_tokens.integers(0, vocab_size, sum(sizes)), np.array(sizes))
        writer.close(None)
    return str(prefix)
