"""Losses of every kept checkpoint on documents that the run was trained on and on others, with the same masks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.config.schema import WEIGHT
from megatron.errors import UserError, require
from megatron.screen import Progress as Bar

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.evaluation.court import Samples
    from megatron.inference.model import InferenceModel
    from megatron.parallel.context import ParallelContext
    from megatron.runs.generalisation import Generalisation, Point, Protocol
    from megatron.runs.run import Run

COUNT = whole(1, 10**9)


def build_parser() -> argparse.ArgumentParser:
    """Flags of tools/generalisation.py."""
    parser = Parser(
        description=__doc__,
        examples=("megatron generalisation runs/ar runs/mdm", "megatron report runs/ar runs/mdm"),
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory; each is scored on its own data")
    add(
        "--load-tag",
        metavar="TAG",
        help="this checkpoint only; default: every one that is kept and was not scored before",
    )
    add_load_kind(parser)
    add("--samples", type=COUNT, metavar="N", help="of each set; default: as many as the validation set has")
    add(
        "--bins",
        type=whole(1, 64),
        default=8,
        metavar="BINS",
        help="of the share of the text that is hidden (default: 8)",
    )
    add("--num-mc", type=COUNT, metavar="PAIRS", help="pairs of masks for a bound (default: 8)")
    add(
        "--train-data-path",
        nargs="+",
        metavar="PREFIX",
        help="documents that were seen; default: the run's training data",
    )
    add("--valid-data-path", nargs="+", metavar="PREFIX", help="documents that were not; default: its validation data")
    add("--data-cache-path", metavar="DIR", help="index maps; default: beside the data")
    add("--batch-size", type=COUNT, default=32, metavar="ROWS", help="rows in a pass (default: 32)")
    add("--tensor-model-parallel-size", type=COUNT, default=1, metavar="RANKS", help="ranks that share a model")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, score, write, print.

    Raises:
        UserError: wrong flags, no run, no checkpoint, or no data.
    """
    options = build_parser().parse_args(arguments)
    from megatron.inference.processes import processes
    from megatron.runs.reading import load_run

    runs = [load_run(path) for path in dict.fromkeys(options.runs)]
    require(
        options.num_mc is None or not all(run.is_exact for run in runs),
        f"--num-mc would have no effect on {', '.join(run.name for run in runs)}",
        "an exact likelihood has no masks",
        "drop it",
    )
    options.num_mc = options.num_mc or 8
    with processes(options.tensor_model_parallel_size) as context:
        for run in runs:
            record = score(run, options, context)
            if context.is_first_rank:
                print(table(run, record), flush=True)
        context.barrier()
    return 0


def score(run: Run, options: argparse.Namespace, context: ParallelContext) -> Generalisation:
    """Score the checkpoints of a run that are not in its record, and add them; a collective call."""
    from megatron.checkpoint.files import read_manifest, step_of
    from megatron.evaluation.generalisation import measure
    from megatron.inference.model import load_model
    from megatron.runs.generalisation import Generalisation, Point
    from megatron.training.progress import Progress

    tags = _tags(run.path, options.load_tag)
    load = partial(load_model, kind=options.load_kind or WEIGHT, context=context)
    first = load(tags[0])
    sets = _sets(run, options, first)
    record = Generalisation.begin(run.path, _protocol(run, first, sets, options))
    how = {"pairs": options.num_mc, "bins": options.bins, "batch_size": options.batch_size}
    for tag in tags:
        step = step_of(tag)
        if step in record.epochs:
            continue
        model = first if tag == tags[0] else load(tag)
        total = sum(len(range(context.dp.rank, len(own.tokens), context.dp.size)) for own in sets.values())
        with Bar(f"{run.name}: step {step}", total, unit="samples", enabled=context.is_first_rank) as bar:
            measured = {name: measure(model, own, **how, on_samples=bar.update) for name, own in sets.items()}
        manifest = read_manifest(tag)
        unique = int(manifest.get("unique_tokens") or run.unique_tokens)
        epoch = Progress.of(manifest, unique_tokens=unique).epoch(unique)
        point = Point(step, epoch, **measured)
        if context.is_first_rank:
            record.add(point)
        record.epochs[step] = epoch
    context.barrier()
    return record


def _tags(folder: Path, tag: str | None) -> list[Path]:
    """The checkpoints to score, in order of steps."""
    from megatron.checkpoint.files import MANIFEST, tag_folders
    from megatron.checkpoint.select import select

    if tag is not None:
        found = [select(folder, tag).tag]
    else:
        found = [own for own in reversed(tag_folders(folder)) if (own / MANIFEST).is_file()]
    kept = [own for own in found if own is not None]
    require(kept, f"{folder} holds no checkpoint", "a loss is of one", "train with --save-interval, and keep them")
    return kept


def _sets(run: Run, options: argparse.Namespace, model: InferenceModel) -> dict[str, Samples]:
    """The documents that the run has seen and those that it has not, as many samples of each."""
    from megatron.data.identity import check_apart, data_fingerprint
    from megatron.evaluation.bench import open_samples

    models, cache = {"": model}, options.data_cache_path
    unseen = open_samples(models, options.valid_data_path or [], number=options.samples, cache_path=cache)
    paths = options.train_data_path or list(model.config.data.train_data_path or [])
    require(
        paths,
        f"no --train-data-path, and {model.source} does not say what it was trained on",
        "seen documents are those of the training data",
        "pass --train-data-path PREFIX",
    )
    trained = (run.info.get("data") or {}).get("train") or []  # by content, wherever it lay
    try:
        check_apart(
            [*data_fingerprint(paths), *trained],
            data_fingerprint(options.valid_data_path or list(model.config.data.valid_data_path or [])),
        )
    except UserError as error:
        raise UserError(
            error.given,
            "one set was seen in training and the other was not",
            "pass --valid-data-path of text that the run was not trained on",
        ) from None
    number = len(unseen.tokens)
    seen = open_samples(models, paths, number=number, cache_path=cache, name="train", is_spread=True)
    return {"seen": seen, "unseen": unseen}


def _protocol(run: Run, model: InferenceModel, sets: dict[str, Samples], options: argparse.Namespace) -> Protocol:
    from megatron.evaluation.generalisation import described
    from megatron.evaluation.witnesses import main_witness
    from megatron.runs.generalisation import Protocol

    witness = main_witness(model, pairs=options.num_mc, batch_size=options.batch_size)
    parts: dict[str, Any] = {name: described(own) for name, own in sets.items()}
    estimator = witness.name if witness.draws else ""
    label = model.objective.label
    weights = options.load_kind or WEIGHT
    return Protocol(
        str(run.info.get("run_id", "")), label, estimator, options.bins, model.max_length, weights=weights, **parts
    )


def table(run: Run, record: Generalisation) -> str:
    """Every checkpoint in a row, for people."""
    own = record.protocol
    lines = [
        f"{run.name}: {own.kind}, nats per token, ± 95 %; seen: "
        f"{own.seen['samples']} samples of {own.seen['documents']} documents, unseen: {own.unseen['samples']} of "
        f"{own.unseen['documents']}",
        f"  {'step':>8}  {'epoch':>8}  {'seen':>16}  {'unseen':>16}  {'unseen − seen':>16}",
    ]
    return "\n".join([*lines, *(_row(point) for point in record.points)])


def _row(point: Point) -> str:
    from megatron.runs.sums import reach

    values = [point.loss("seen"), point.loss("unseen"), point.gap()]
    cells = [f"{value.value:.4f} ± {reach(value):.4f}" for value in values]
    return f"  {point.step:>8}  {point.epoch:>8.2f}  " + "  ".join(f"{cell:>16}" for cell in cells)
