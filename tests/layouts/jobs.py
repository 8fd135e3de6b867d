"""What workers run: whole training programs, with what happens inside them recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

VOCAB = 500  # padded to 512 for every layout here
DEFAULTS: dict[str, Any] = {
    "num-layers": 2,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "micro-batch-size": 4,
    "global-batch-size": 8,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": VOCAB,
    "train-iters": 10,
    "lr": 1e-3,
    "hidden-dropout": 0,
    "attention-dropout": 0,
    "log-interval": 1,
    "num-workers": 0,
}


def flags(data: Path, save: Path | None, **changes: Any) -> list[str]:
    """A command line: the defaults, the data, and changes (underscores for dashes; True for a bare flag, None to drop)."""
    values: dict[str, Any] = {**DEFAULTS, "train-data-path": data / "train", "save": save}
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    words: list[str] = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def records(run_dir: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """The lines of one kind in metrics.jsonl by step; a step that is there twice is an error."""
    found: dict[int, dict[str, Any]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == kind:
            assert record["step"] not in found, f"two {kind} lines of step {record['step']}"
            found[record["step"]] = record
    return found


@dataclass
class Trace:
    """One rank's view of a run.

    Attributes:
        status: what main() returned.
        place: {"tp", "dp", "pp"}: this rank's coordinates.
        losses, grad_norms, skipped: of every step.
        weights: fragments of the initial fp32 weights: (name, tp_rank, start, values).
        specs: ShardSpec of every tensor on this rank.
        inputs: what the embedding was given in training, one entry a micro-batch (first stage only).
        targets: what the loss was given in training, one entry a micro-batch (last stage only).
        batches: every ModelBatch that this rank read.
        hidden: outputs of the blocks in the first micro-batch of every step.
    """

    status: int = 0
    place: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    weights: list[tuple] = field(default_factory=list)
    specs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)


@dataclass
class Run:
    """A finished run: every rank's trace, and what it wrote.

    Attributes:
        traces: by rank.
        train, valid: lines of metrics.jsonl by step.
        run_dir: where it wrote.
    """

    traces: list[Trace]
    train: dict[int, dict[str, Any]]
    valid: dict[int, dict[str, Any]]
    run_dir: Path


def train(objective: str, argv: list[str], watch: tuple[str, ...] = ()) -> Trace:
    """Run ``main()`` on this rank and say what it did.

    Args:
        objective: default objective of the program.
        argv: command line.
        watch: what to record besides the numbers of each step: "weights", "tensors", "hidden".
    """
    from megatron.training import main as main_module

    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(main_module, "_leave"))  # the pool keeps its group
        stack.enter_context(_recording_steps(trace))
        for name in watch:
            stack.enter_context(RECORDERS[name](trace))
        trace.status = main_module.main(objective, argv)
    return trace


@contextmanager
def _recording_steps(trace: Trace) -> Iterator[None]:
    from megatron.training.deepspeed.engine import Engine

    original = Engine.train_step

    def train_step(self: Engine, data: Any, **arguments: Any) -> Any:
        context = self.context
        trace.place = {"tp": context.tp_rank, "dp": context.dp_rank, "pp": context.pp_rank}
        result = original(self, data, **arguments)
        trace.losses.append(result.loss.item())
        trace.grad_norms.append(result.grad_norm)
        trace.skipped.append(result.skipped)
        return result

    with mock.patch.object(Engine, "train_step", train_step):
        yield


@contextmanager
def _recording_weights(trace: Trace) -> Iterator[None]:
    """The fp32 masters right before the first step."""
    from megatron.training.deepspeed.engine import Engine
    from megatron.training.deepspeed.shards import ShardedState

    original = Engine.train_step

    def train_step(self: Engine, data: Any, **arguments: Any) -> Any:
        if not trace.weights:
            state = ShardedState(self.module, self.optimizer, self.context)
            trace.specs = state.specs()
            trace.weights = [(f.name, f.tp_rank, f.start, f.data.clone().float()) for f in state.fragments_to_save()]
        return original(self, data, **arguments)

    with mock.patch.object(Engine, "train_step", train_step):
        yield


@contextmanager
def _recording_tensors(trace: Trace) -> Iterator[None]:
    """What the two ends of the model are really given, and what the loader made."""
    from megatron.model import embedding, gpt
    from megatron.model import loss as head
    from megatron.training.deepspeed import engine

    embed, original_step = embedding.Embedding.forward, engine.Engine.train_step

    def forward(self: Any, inputs: Any) -> Any:
        if self.training:
            trace.inputs.append((inputs[0] if isinstance(inputs, tuple) else inputs).clone())
        return embed(self, inputs)

    def loss(output: Any, targets: Any, context: Any) -> Any:
        trace.targets.append(tuple(tensor.clone() for tensor in targets))
        return head.weighted_loss(output, targets, context)

    loss.__name__ = "weighted_loss"

    def train_step(self: Any, data: Any, **arguments: Any) -> Any:
        return original_step(self, _remembering(data, trace.batches.append), **arguments)

    with (
        mock.patch.object(embedding.Embedding, "forward", forward),
        mock.patch.object(gpt, "weighted_loss", loss),
        mock.patch.object(engine, "weighted_loss", loss),
        mock.patch.object(engine.Engine, "train_step", train_step),
    ):
        yield


def _remembering(data: Iterator[Any], remember: Callable[[Any], None]) -> Iterator[Any]:
    for item in data:
        remember(item)
        yield item


@contextmanager
def _recording_hidden(trace: Trace) -> Iterator[None]:
    from megatron.model.block import TransformerBlock

    original = TransformerBlock.forward

    def forward(self: TransformerBlock, state: Any) -> Any:
        result = original(self, state)
        trace.hidden.append((result[0] if isinstance(result, tuple) else result).detach().clone())
        return result

    with mock.patch.object(TransformerBlock, "forward", forward):
        yield


RECORDERS: dict[str, Any] = {
    "weights": _recording_weights,
    "tensors": _recording_tensors,
    "hidden": _recording_hidden,
}


def run_main(objective: str, argv: list[str]) -> int:
    """``main()`` in a process of its own."""
    from megatron.training.main import main

    return main(objective, argv)
