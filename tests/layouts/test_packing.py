"""Packed documents under every layout: each document's losses are those of the document alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layouts import jobs
from layouts.pool import WorkerPool

SAMPLES = 8
RESET = {"reset_position_ids": True, "reset_attention_mask": True}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train``: documents of odd lengths, empty, of one token, of a whole sample and longer, each with its EOD;
    and ``blocks/train``, where every document begins with a block of four."""
    from megatron.data.prepare.writer import IndexedDatasetWriter

    folder = tmp_path_factory.mktemp("documents")
    (folder / "blocks").mkdir()
    for name, sizes in (("", [7, 11, 5, 0, 47, 1, 13, 9, 32, 1, 33]), ("blocks", [8, 12, 4, 0, 48, 32, 28, 36])):
        with IndexedDatasetWriter(folder / name / "train", np.dtype(np.uint16)) as writer:
            random = np.random.default_rng(0)
            for size in sizes * 5:
                tokens = np.append(random.integers(0, 499, max(0, size - 1)), 499)[:size]
                writer.add_document(tokens.astype(np.uint16))
    return folder


def token_losses(objective: str, argv: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Inputs and targets of the first samples, and the loss of each token as the engine of this rank finds it."""
    from megatron.data.dataset import build_dataset
    from megatron.data.loader import Share, build_loader, build_packing
    from megatron.objectives import build_objective, parse
    from megatron.parallel.context import ParallelContext
    from megatron.parallel.launch import Launch
    from megatron.training.engine import build_engine
    from megatron.training.resolve import resolve

    launch = Launch.from_environment()
    flags = parse(argv, objective=objective, world_size=launch.world_size)
    config = resolve(flags, launch, run_name="packed").settings
    parallel = config.parallel
    context = ParallelContext.create(
        tp_size=parallel.tensor_model_parallel_size, pp_size=parallel.pipeline_model_parallel_size
    )
    engine = build_engine(config, build_objective(config), context)
    view = engine.objective if objective == "dual" else engine.objective.for_eval()  # samples of both kinds
    seq_length = config.model.seq_length
    dataset = build_dataset(
        config.data.train_data_path, num_samples=SAMPLES, seq_length=seq_length, seed=1, name="train"
    )
    share = Share(context.dp, config.run.micro_batch_size, SAMPLES)
    loader = build_loader(
        dataset, view, share, device=context.device, num_workers=0, packing=build_packing(config.data)
    )
    with loader:
        batches = list(loader)
    with engine.evaluating(view):
        losses = engine.eval_step(iter(batches), num_micro_batches=len(batches))
    inputs, targets = zip(*batches)
    merged = [
        torch.cat(parts)
        for parts in (
            [i.input_ids for i in inputs],
            [i.segment_ids for i in inputs],
            [t.labels for t in targets],
            [t.loss_weights for t in targets],
            [i.is_causal for i in inputs if i.is_causal is not None] or [torch.ones(0)],
        )
    ]
    return merged, losses


def alone(objective: str, argv: list[str], parts: list[torch.Tensor]) -> torch.Tensor:
    """The same losses from the plain model, each document by itself: no positions, no segments, no mask tensor."""
    from megatron.model.batch import Inputs
    from megatron.model.gpt import GPTModel
    from megatron.model.mask import Causal, Full
    from megatron.objectives import parse
    from megatron.parallel.launch import Launch
    from megatron.parallel.tensor import ParameterFactory
    from megatron.training.resolve import resolve

    plan = resolve(parse(argv, objective=objective), Launch(), run_name="packed")
    kind = plan.objective.for_eval().attention_mask
    model = GPTModel(plan.shape, ParameterFactory(seed=plan.seeds.run)).eval()
    ids, segments, labels, weights, is_causal = parts
    losses = torch.zeros(weights.shape)
    with torch.no_grad():
        for row in range(len(ids)):
            mask = (Causal() if is_causal[row] else Full()) if len(is_causal) else kind
            for segment in segments[row].unique():
                own = segments[row] == segment  # in both copies of block diffusion
                length = int(own[: plan.shape.seq_length].sum())
                places = torch.arange(length).repeat(int(own.sum()) // length)[None]
                logits = model.logits(Inputs(ids[row][own][None], places), mask)[0]
                losses[row][own] = F.cross_entropy(logits, labels[row][own], reduction="none") * weights[row][own]
    return losses


@pytest.mark.parametrize(
    ("objective", "folder", "options"),
    [
        ("ar", "", {}),
        ("mdm", "", {}),
        ("dual", "", {}),
        ("block_diffusion", "", {"block_size": 1}),
        ("block_diffusion", "blocks", {"block_size": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {"tp_size": 2}), (2, {"pp_size": 2})], ids=str)
def test_losses_are_those_of_each_document_alone(
    pools: Callable[[int], WorkerPool],
    documents: Path,
    tmp_path: Path,
    objective: str,
    folder: str,
    options: dict[str, Any],
    size: int,
    layout: dict[str, Any],
) -> None:
    argv = jobs.flags(documents / folder, tmp_path / "run", **RESET, **options, **layout)
    single = jobs.flags(documents / folder, tmp_path / "run", **RESET, **options)
    results = pools(size).run(token_losses, objective, argv)
    parts, losses = results[-1]  # the last stage knows them
    pieces = [len(row.unique()) for row in parts[1]]
    assert min(pieces) <= 2 and max(pieces) >= 4  # most of a long document, and several whole ones between cut ones
    expected = alone(objective, single, parts)
    assert losses.shape == expected.shape == parts[0].shape and (losses > 0).sum() > SAMPLES * 8
    assert (losses - expected).abs().max() < 1e-6 * max(1.0, float(parts[3].max()))


def test_without_the_reset_documents_see_each_other(
    pools: Callable[[int], WorkerPool], documents: Path, tmp_path: Path
) -> None:
    """The test above can fail: positions alone do not part the documents."""
    argv = jobs.flags(documents, tmp_path / "run", **RESET)
    parts, losses = pools(1).run(token_losses, "ar", argv)[0]
    whole = [parts[0], torch.zeros_like(parts[1]), *parts[2:]]
    assert (alone("ar", argv, whole) - losses).abs().max() > 1e-3


def test_documents_ends_leave_the_loss(pools: Callable[[int], WorkerPool], tmp_path: Path) -> None:
    """Training and validation under --eod-mask-loss, in two layouts. An end of document has no byte of text, so a token in the
    loss has more of them than one of the data: how many is not known, and no bits per byte are given."""
    from megatron.data.prepare.writer import IndexedDatasetWriter

    random = np.random.default_rng(0)
    for name in ("train", "valid"):
        with IndexedDatasetWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for size in random.integers(4, 30, 200):
                writer.add_document(np.append(random.integers(0, 200, size), 499).astype(np.uint16))
        (tmp_path / f"{name}.meta.json").write_text(
            '{"eod_id": 499, "vocab_size": 500, "tokens": 3500, "text_bytes": 13200}'
        )
    records = {}
    for size, layout in ((1, {}), (2, {"micro_batch_size": 8, "tp_size": 2})):
        options = {"eod_mask_loss": True, "valid_data_path": tmp_path / "valid", "train_iters": 3}
        argv = jobs.flags(tmp_path, tmp_path / f"run{size}", **{**options, "micro_batch_size": 8, **layout, **RESET})
        assert [trace.status for trace in pools(size).run(jobs.train, "ar", argv)] == [0] * size
        records[size] = jobs.records(tmp_path / f"run{size}", "valid")[3]
    assert records[1]["nll"] == pytest.approx(records[2]["nll"], abs=1e-5)
    assert 0 < records[1]["nll"] < 7 and records[1]["bits_per_byte"] is None
