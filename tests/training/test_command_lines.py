"""A seeded storm of command lines, made from the options themselves: each gives a plan or is refused in words.

Everything up to the plan runs, in this process: parser, rules, data, tokenizer, checkpoint, run directory. Outcomes:
*plan*, *refused* (UserError), *help* (asked for), *traceback* (any other exception) and *nonsense* (a plan although a
number was out of its range, a plan that contradicts itself, or one that is another one when it comes back from
``--dump-config`` or run.json). The last two must not happen. ``STORM=1`` makes it 25 times
as long.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import traceback
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.saved import save

from megatron.config import config_to_dict, values_of
from megatron.config.cli import build_parser
from megatron.config.option import idle_options, spelling
from megatron.config.recorded import ONE_FOLDER
from megatron.config.schema import Config
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse
from megatron.parallel.launch import Launch
from megatron.training.configuration import document, recorded
from megatron.training.plan import Plan
from megatron.training.resolve import resolve

CONFIG_SHARE = 1.0 if os.environ.get("STORM") == "1" else 0.3  # of the plans, read again from files
LINES = 30_000 if os.environ.get("STORM") == "1" else 1_200
BASE = {
    "--train-data-path": "data", "--tokenizer-type": "NullTokenizer", "--vocab-size": "500", "--num-layers": "2",
    "--hidden-size": "64", "--num-attention-heads": "4", "--seq-length": "16", "--train-samples": "800",
    "--micro-batch-size": "2", "--global-batch-size": "8",
}  # fmt: skip
NUMBERS = ("-1", "0", "1", "2", "3", "8", "0.5", "1e-3", "1e6", "-0.0", "-1e-9", "7", "64", "1000000000000")
NOT_FINITE = ("nan", "inf", "-inf", "1e999", "-1e400", "9" * 400, "9" * 5000)
NO_NUMBERS = ("", " ", "abc", "1e", "0x10", "1_000", "١٢", "½", "--", "1 2", "1,5", "None", "true")
PATHS = (
    "", " ", ".", "..", "/", "data", "data.bin", "run", "empty", "torn", "run/global_step20", "absent/x", "/dev/null",
    "/dev/null/x", "/proc/1/x", "loop", "~", "-x", "a\nb", "é", "\udcff", "x" * 300, "[MASK:5]", "*", "%s", "{}", "json",
)  # fmt: skip


@dataclass
class Line:
    """One command line.

    Attributes:
        words: arguments.
        world_size: processes that a launcher is said to have started.
        outside: flags whose number is out of range, each with the text.
    """

    words: list[str] = field(default_factory=list)
    world_size: int = 1
    outside: list[str] = field(default_factory=list)


class Generator:
    """Draws command lines."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        sections = [section.default_factory for section in fields(Config)]
        own = [item for cls in (*sections, *(o.Options for o in OBJECTIVES.values())) for item in fields(cls)]
        self.items = {item.name: item for item in own if item.metadata}
        self.actions = [action for action in build_parser(OBJECTIVES)._actions if action.dest != "help"]

    def line(self) -> Line:
        """One line: a good one with up to six changes."""
        chance, line = self.chance, Line(world_size=self.chance.choice((1, 1, 1, 1, 2, 3, 4, 8)))
        values: dict[str, list[str]] = {flag: [value] for flag, value in BASE.items()}
        for action in chance.sample(self.actions, chance.choice((1, 1, 2, 2, 3, 4, 6))):
            flag = chance.choice(action.option_strings)
            if flag in values and chance.random() < 0.3:
                del values[flag]
                continue
            for other in action.option_strings:  # a number counts only where no later one replaces it
                values.pop(other, None)
            values[flag] = self.values(action, flag, line)
        if chance.random() < 0.03:
            values[chance.choice(("--unknown", "--micro-batch", "-z", "--save=", "stray", "--no-save"))] = []
        flags = list(values)
        chance.shuffle(flags)
        for flag in flags:
            joined = len(values[flag]) == 1 and flag.startswith("--") and chance.random() < 0.2
            line.words += [f"{flag}={values[flag][0]}"] if joined else [flag, *values[flag]]
        return line

    def values(self, action: Any, flag: str, line: Line) -> list[str]:
        """What follows a flag."""
        chance, item = self.chance, self.items.get(action.dest)
        if action.nargs == 0:
            return [] if chance.random() < 0.95 else ["True"]
        if action.nargs == "?":
            return [] if chance.random() < 0.8 else [chance.choice(("True", "False", "yes", "0", "2", "maybe", ""))]
        if chance.random() < 0.05:
            return []  # the value is missing
        if item is not None and item.metadata["range"] is not None:
            text = self.number(item.metadata["range"])
            if not is_inside(text, item.metadata["range"]):
                line.outside.append(f"{flag} {text}")
            return [text]
        if action.choices:
            return [chance.choice([*action.choices, *action.choices, "other", "", str(action.choices[0]).upper()])]
        if action.nargs == "*":
            return [chance.choice([*PATHS, *NUMBERS, *NOT_FINITE]) for _ in range(chance.randrange(5))]
        return [chance.choice(PATHS if chance.random() < 0.8 else (*NUMBERS, *NOT_FINITE))]

    def number(self, allowed: Any) -> str:
        """A number in its range, at its edge, beyond it, or none at all."""
        edges = [x for x in (allowed.at_least, allowed.above, allowed.at_most, allowed.below) if x is not None]
        near = [f"{edge + step:.17g}" for edge in edges for step in (-1, -1e-6, 0, 1e-6, 1)]
        pool = self.chance.choices((NUMBERS, near or NUMBERS, NOT_FINITE, NO_NUMBERS), (5, 3, 1, 1))[0]
        return self.chance.choice(pool)


def is_inside(text: str, allowed: Any) -> bool:
    """Whether a text is a number within the bounds; worked out from the bounds alone."""
    try:
        value = float(text)
    except ValueError:
        return False
    return (
        math.isfinite(value)
        and not (allowed.at_least is not None and value < allowed.at_least)
        and not (allowed.above is not None and value <= allowed.above)
        and not (allowed.at_most is not None and value > allowed.at_most)
        and not (allowed.below is not None and value >= allowed.below)
    )


def contradictions(plan: Plan) -> list[str]:
    """Rules of a run, written down once more, that the plan breaks."""
    layout, schedule, shape = plan.layout, plan.schedule, plan.shape
    run, optimizer = plan.settings.run, plan.settings.optimizer
    numbers = [
        (section.name, item.name, value)
        for section in fields(Config)
        for item in fields(getattr(plan.settings, section.name))
        if isinstance(value := getattr(getattr(plan.settings, section.name), item.name), float)
    ]
    options, mask_id = plan.settings.objective.options, plan.settings.objective.mask_token_id
    rules = {
        "every number is finite": all(math.isfinite(value) for _, _, value in numbers)
        and all(math.isfinite(value) for value in options.values() if isinstance(value, float)),
        "tp x pp x dp is the number of processes": layout.tp_size * layout.pp_size * layout.dp_size == layout.world_size,
        "a step is whole": layout.num_micro_batches >= 1
        and layout.num_micro_batches * layout.micro_batch_size * layout.dp_size == layout.global_batch_size,
        "there is a step": run.skip_train or schedule.train_samples >= layout.global_batch_size,
        "every stage has a block": shape.num_layers >= layout.pp_size,
        "heads are shared evenly": shape.num_attention_heads % layout.tp_size == 0
        and shape.num_attention_heads % shape.num_query_groups == 0,
        "rotations take pairs": not shape.use_rotary_position_embeddings or shape.kv_channels % 2 == 0,
        "every token has a row": shape.padded_vocab_size >= plan.vocabulary.size,
        "the mask has a row": mask_id is None or 0 <= mask_id < shape.padded_vocab_size,
        "warm-up comes before decay": optimizer.lr_decay_style == "constant"
        or 0 <= optimizer.lr_warmup_samples < optimizer.lr_decay_samples,
        "rates fall": 0 <= optimizer.min_lr <= optimizer.lr and optimizer.lr > 0,
        "probabilities are ones": 0 <= plan.settings.model.hidden_dropout < 1 and 0 <= plan.settings.model.attention_dropout < 1,
        "there are data": bool(plan.sources.train) or (run.skip_train and bool(plan.sources.valid)),
        "what is continued is there": run.load is None or plan.start.tag is not None or not run.skip_train,
    }  # fmt: skip
    return [rule for rule, holds in rules.items() if not holds]


def start(words: list[str], world_size: int) -> tuple[Config, Plan]:
    """Flags and plan of a start."""
    launch = Launch(0, world_size, 0, "127.0.0.1", 1) if world_size > 1 else Launch()
    origins: dict[str, str] = {}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        flags = parse(words, objective="mdm", world_size=world_size, origins=origins, recorded=recorded)
        return flags, resolve(flags, launch, run_name="new", origins=origins)


# What a run leaves behind where a repetition has another place, or begins from nothing.
PLACES = ("save", "load", "load_tag", *ONE_FOLDER)


def lost(flags: Config, plan: Plan, line: Line) -> list[str]:
    """What a plan loses on its way through ``--dump-config`` or run.json, and back by ``--config``."""
    chance = random.Random(repr(line))
    if chance.random() > CONFIG_SHARE:
        return []
    path, wrong = Path("again/run.json"), []
    path.parent.mkdir(exist_ok=True)
    Path("dump.yaml").write_text("\n".join(document(flags, plan)))
    again = start(["--config", "dump.yaml"], line.world_size)[1]
    wrong += [f"--dump-config loses {name}: {values}" for name, values in differing(plan, again).items()]
    if plan.start.tag is None and not plan.settings.run.skip_train:
        record = {
            "objective": "mdm", "config": config_to_dict(plan.settings), "noise_scheme": plan.seeds.scheme,
            "unique_tokens": plan.sources.unique_tokens, "tokenizer": plan.vocabulary.tokenizer,
        }  # fmt: skip
        path.write_text(json.dumps(record))
        elsewhere = [] if plan.settings.run.save is None else ["--save", "elsewhere"]
        again = start(["--config", str(path), *elsewhere], line.world_size)[1]
        found = differing(plan, again, without=(*PLACES, *(idle for idle, _ in idle_options(given_items(plan)))))
        wrong += [f"run.json loses {name}: {values}" for name, values in found.items()]
        path.unlink()
    return wrong


def given_items(plan: Plan) -> list[tuple[Any, Any]]:
    sections = [getattr(plan.settings, section.name) for section in fields(Config)]
    return [(item, getattr(part, item.name)) for part in sections for item in fields(part) if item.metadata]


def differing(plan: Plan, again: Plan, without: tuple[Any, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Settings and parts of two plans that differ."""
    passed = {getattr(item, "name", item) for item in without}
    before, after = values_of(plan.settings), values_of(again.settings)
    found = {
        name: (before[name], after.get(name)) for name in before.keys() - passed if before[name] != after.get(name)
    }
    parts = (
        "layout",
        "seeds",
        "objective",
        "vocabulary",
        *(() if without else ("shape", "start", "run_dir")),
    )
    pairs = {name: (getattr(plan, name), getattr(again, name)) for name in parts}
    for name in ("train_samples", "order_samples"):
        pairs[name] = getattr(plan.schedule, name), getattr(again.schedule, name)
    return found | {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def outcome(line: Line) -> tuple[str, str]:
    """What a start makes of the line, and the details of what must not happen."""
    try:
        flags, plan = start(line.words, line.world_size)
    except UserError as error:
        words = error.given and error.rule and error.fix
        return ("refused", "") if words else ("traceback", "an error without three parts")
    except SystemExit as error:
        is_help = error.code in (0, None) and any(word.partition("=")[0] in ("-h", "--help") for word in line.words)
        return ("help", "") if is_help else ("traceback", f"status {error.code}")
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    wrong = [*line.outside, *contradictions(plan), *lost(flags, plan, line)]
    return ("nonsense", "; ".join(wrong)) if wrong else ("plan", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the paths of the lines lead: data, a run, one whose checkpoint is torn, an empty folder, a loop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with IndexedDatasetWriter(tmp_path / "data", np.dtype(np.uint16)) as writer:
        for size in range(20, 60):
            writer.add_document(np.arange(size) % 500)
    save(tmp_path / "run", 20)
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    (tmp_path / "torn/global_step20/manifest.json").write_text("{")
    (tmp_path / "json").write_text('["a", 1e999, null]')
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.timeout(3600)
def test_every_command_line_is_a_plan_or_refused_in_words(folder: Path) -> None:
    generator, counts, faults = Generator(20261125), Counter[str](), []
    assert outcome(Line([word for pair in BASE.items() for word in pair])) == ("plan", "")
    for _ in range(LINES):
        line = generator.line()
        what, details = outcome(line)
        counts[what] += 1
        if what in ("traceback", "nonsense"):
            faults.append(f"{what}: {' '.join(map(ascii, line.words))} ({line.world_size} processes)\n{details}")
    print(f"{LINES} command lines: {dict(sorted(counts.items()))}")
    assert not faults, "\n\n".join([str(dict(counts)), *faults[:15]])
    assert all(counts[what] > LINES // 50 for what in ("plan", "refused")), counts


def test_a_number_out_of_range_is_seen_by_the_oracle() -> None:
    """The storm can fail: lines with numbers out of range are many, and each is noticed as such."""
    generator = Generator(1)
    lines = [generator.line() for _ in range(300)]
    assert sum(bool(line.outside) for line in lines) > 60
    items = generator.items
    assert spelling(items["lr"]) == "--lr" and not is_inside("nan", items["lr"].metadata["range"])
    assert is_inside("1e-3", items["lr"].metadata["range"])
