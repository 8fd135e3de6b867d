"""What workers run: whole training programs, with what happens inside them recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Begins = Callable[[int], None]
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


def train(objective: str, argv: list[str], watch: tuple[str, ...] = (), begins: Begins | None = None) -> Trace:
    """Run ``main()`` on this rank and say what it did.

    Args:
        objective: default objective of the program.
        argv: command line.
        watch: what to record besides the numbers of each step: "weights", "tensors", "hidden".
        begins: called with the number of every step, from 1, before it begins.
    """
    from megatron.training.main import main

    trace = Trace()
    trace.status = main(objective, argv, observer=recorder(trace, watch, begins))
    return trace


def recorder(trace: Trace, watch: tuple[str, ...], begins: Begins | None) -> Any:
    """The observer that fills ``trace``; a class made here, because pools import this module before torch is wanted."""
    from megatron.model.block import TransformerBlock
    from megatron.model.gpt import Embedding
    from megatron.training.step import Observer, PendingStep

    def first(value: Any) -> Any:
        return (value[0] if isinstance(value, tuple) else value).detach().clone()

    class Recorder(Observer):
        def built(self, engine: Any) -> None:
            context = engine.context
            trace.place = {"tp": context.tp.rank, "dp": context.dp.rank, "pp": context.pp.rank}
            self.module, self.is_training = engine.module, False
            if "weights" in watch:
                trace.specs = engine.shards.specs()
                found = engine.shards.fragments_to_save()
                trace.weights = [(f.name, f.tp_rank, f.start, f.data.clone().float()) for f in found]
            for module in engine.module.modules():
                if "tensors" in watch and isinstance(module, Embedding):
                    module.register_forward_pre_hook(self.embedding_called)
                if "hidden" in watch and isinstance(module, TransformerBlock):
                    module.register_forward_hook(lambda _module, _given, made: trace.hidden.append(first(made)))

        def embedding_called(self, module: Any, given: Any) -> None:
            if module.training:
                trace.inputs.append(first(given[0]))

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            if begins is not None:
                begins(len(trace.losses) + 1)

        def batch_read(self, batch: Any) -> None:
            if "tensors" in watch and self.module.training:
                trace.batches.append(batch)

        def loss_asked(self, targets: Any) -> None:
            if "tensors" in watch and self.module.training:
                trace.targets.append(tuple(tensor.clone() for tensor in targets if tensor is not None))

        def step_ended(self, result: Any) -> None:
            numbers = PendingStep(result).read()
            trace.losses.append(numbers.loss)
            trace.grad_norms.append(numbers.grad_norm)
            trace.skipped.append(numbers.skipped)

    return Recorder()


def run_main(objective: str, argv: list[str]) -> int:
    """``main()`` in a process of its own."""
    from megatron.training.main import main

    return main(objective, argv)
