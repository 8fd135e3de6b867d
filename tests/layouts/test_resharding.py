"""A run moves from layout to layout, optimizer state included, and its losses go on as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import jobs
from layouts.pool import WorkerPool
from megatron.checkpoint import files
from megatron.checkpoint.averaging import mean_of
from megatron.checkpoint.reader import CheckpointReader

STEPS = 5
# Issue 3's matrix first, then the ZeRO stages, the other engine and the optimizer in host memory.
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp_size": 2}),
    (2, {"pp_size": 2}),
    (4, {"tp_size": 2, "pp_size": 2}),
    (2, {"zero_stage": 1}),
    (2, {"engine": "fsdp2"}),
    (1, {}),
    (2, {"zero_stage": 3}),
    (4, {"engine": "fsdp2", "tp_size": 2, "zero_stage": 3}),
    (4, {"tp_size": 2, "zero_stage": 2, "no_sequence_parallel": True}),
    (2, {"cpu_optimizer": True}),
    (1, {}),
]
# Muon's state is of another kind.
MUON_CHAIN = [(2, {"tp_size": 2}), (2, {"zero_stage": 3}), (2, {"pp_size": 2}), (2, {"zero_stage": 1}), (1, {})]
MUON = {"optimizer": "muon"}
TOLERANCE = 1e-5
VARIANT = {"untie_embeddings_and_output_weights": True, "num_query_groups": 2, "no_disable_bias_linear": True}


@pytest.mark.timeout(900)  # thirteen jobs, of which the pool watches each
@pytest.mark.parametrize(("optimizer", "chain"), [("adam", CHAIN), ("muon", MUON_CHAIN)])
def test_losses_continue_through_every_layout(
    pools: Callable[[int], WorkerPool],
    token_files: Path,
    tmp_path: Path,
    optimizer: str,
    chain: list[tuple[int, dict[str, Any]]],
) -> None:
    total = STEPS * (len(chain) + 1)
    schedule = {
        "lr_decay_style": "wsd",
        "lr_decay_samples": 8 * total,
        "lr_wsd_decay_samples": 4 * total,
        "save_interval": STEPS,
        "micro_batch_size": 2,
        "ema_decay": 0.9,
        "optimizer": optimizer,
    }
    schedule |= VARIANT

    def run(size: int, save: Path, steps: int, **changes: Any) -> list[jobs.Trace]:
        argv = jobs.flags(token_files, save, train_iters=steps, **schedule, **changes)
        return pools(size).run(jobs.train, "mdm", argv)

    (straight,) = run(1, tmp_path / "straight", total)
    previous = tmp_path / "straight"
    for number, (size, layout) in enumerate(chain, start=1):
        done = STEPS * number
        here = tmp_path / f"leg{number}"
        traces = run(size, here, done + STEPS, load=previous, load_tag=f"global_step{done}", **layout)
        for trace in traces:
            assert trace.losses == pytest.approx(straight.losses[done : done + STEPS], abs=TOLERANCE, rel=0), layout
            norms = straight.grad_norms[done : done + STEPS]
            assert trace.grad_norms == pytest.approx(norms, rel=10 * TOLERANCE), layout
        previous = here
    tags = [(tmp_path / f"leg{number}", f"global_step{STEPS * (number + 1)}") for number in range(1, len(chain) + 1)]
    for kind in ("weight", "ema"):  # however they were laid out
        _, ours, _ = mean_of([leg / tag for leg, tag in tags], kind)
        _, theirs, _ = mean_of([tmp_path / "straight" / tag for _, tag in tags], kind)
        for name, tensor in theirs.items():
            assert apart(ours[name], tensor) < TOLERANCE, name
    ours, theirs = (CheckpointReader(folder / f"global_step{total}") for folder in (previous, tmp_path / "straight"))
    assert ours.manifest["average_updates"] == theirs.manifest["average_updates"] == total
    for name in theirs.specs:
        assert apart(ours.tensor(name, "ema"), theirs.tensor(name, "ema")) < TOLERANCE, name
        assert not ours.tensor(name, "ema").equal(ours.tensor(name))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the differences: AdamW turns the sign of a gradient near zero into a whole step of one weight."""
    return float((one - other).square().mean().sqrt())


def test_a_forgotten_optimizer_would_show(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """The matrix means something: without the moments the losses differ by far more than its tolerance."""
    schedule = {"lr_decay_samples": 8 * 10, "save_interval": STEPS}
    argv = jobs.flags(token_files, tmp_path / "straight", train_iters=10, **schedule)
    (straight,) = pools(1).run(jobs.train, "mdm", argv)
    load = {"load": tmp_path / "straight", "load_tag": "global_step5", "no_load_optim": True}
    argv = jobs.flags(token_files, tmp_path / "without", train_iters=10, **schedule, **load)
    (without,) = pools(1).run(jobs.train, "mdm", argv)
    assert without.losses[0] == straight.losses[5]
    assert abs(without.losses[2] - straight.losses[7]) > 1e-3


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {"pp_size": 2}),
        (2, {"zero_stage": 2}),
        (2, {"engine": "fsdp2"}),
        (2, {"tp_size": 2, **MUON}),
        (2, {"zero_stage": 3, **MUON}),
    ],
)
def test_bf16_runs_continue_bit_for_bit(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    """The fp32 masters are saved, not the bf16 weights made from them."""
    options = {"bf16": True, "save_interval": 3, "train_iters": 6, **layout}
    straight = pools(size).run(jobs.train, "mdm", jobs.flags(token_files, tmp_path / "straight", **options))
    load = {"load": tmp_path / "straight", "load_tag": "global_step3"}
    again = pools(size).run(jobs.train, "mdm", jobs.flags(token_files, tmp_path / "again", **options, **load))
    for before, after in zip(straight, again):
        assert after.losses == before.losses[3:]
        assert after.grad_norms == before.grad_norms[3:]


@dataclass
class Reads:
    """What a rank read of a checkpoint: files opened for tensors, bytes of tensors, and files hashed."""

    opened: list[str]
    num_bytes: int
    hashed: list[str]
    losses: list[float]


def train_counted(argv: list[str]) -> Reads:
    """A run of masked diffusion that loads a checkpoint, as :func:`jobs.train`."""
    found = Reads([], 0, [], [])
    plain_open, preadv, sha256_of = os.open, os.preadv, files.sha256_of

    def counted_open(path: Any, *rest: Any, **more: Any) -> int:
        found.opened += [Path(path).name] * str(path).endswith(".safetensors")
        return plain_open(path, *rest, **more)

    def counted_read(*given: Any) -> int:
        count = preadv(*given)
        found.num_bytes += count
        return count

    def counted_hash(path: Path) -> str:
        found.hashed.append(path.name)
        return sha256_of(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", counted_open)
        patch.setattr(os, "preadv", counted_read)
        patch.setattr(files, "sha256_of", counted_hash)
        found.losses = jobs.train("mdm", argv).losses
    return found


@pytest.mark.parametrize(
    ("before", "after", "opens"),
    [
        ((2, {"tp_size": 2}), (2, {"zero_stage": 3}), 2),
        ((2, {"zero_stage": 1}), (4, {"zero_stage": 1}), 1),
        ((2, {"zero_stage": 1}), (2, {"zero_stage": 1}), 1),
    ],
    ids=["tp2-zero3", "dp2-dp4", "same"],
)
def test_a_rank_reads_its_share_from_the_files_that_have_it(
    pools: Callable[[int], WorkerPool],
    token_files: Path,
    tmp_path: Path,
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
    opens: int,
) -> None:
    """Together the ranks read every byte of weights and moments once, and verify every file once."""
    common: dict[str, Any] = {**VARIANT, "lr_decay_samples": 8 * STEPS, "micro_batch_size": 2}
    argv = jobs.flags(token_files, tmp_path / "first", train_iters=1, **common, **before[1])
    pools(before[0]).run(jobs.train, "mdm", argv)
    tag = tmp_path / "first" / "global_step1"
    saved = CheckpointReader(tag)
    argv = jobs.flags(token_files, tmp_path / "then", train_iters=2, load=tmp_path / "first", **common, **after[1])
    reads = pools(after[0]).run(train_counted, argv)
    total = 12 * sum(torch.Size(spec.full_shape).numel() for spec in saved.specs.values())
    assert [len(read.losses) for read in reads] == [1] * after[0]
    assert sorted(name for read in reads for name in read.hashed) == sorted(saved.manifest["files"])
    assert sum(read.num_bytes for read in reads) == total
    for read in reads:
        assert len(read.opened) == len(set(read.opened)) == opens
        assert read.num_bytes == pytest.approx(total / after[0], rel=0.02)


@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"engine": "fsdp2"}, {"engine": "fsdp2", "tp_size": 2}])
def test_a_warm_start_reads_its_share_and_the_first_rank_the_embedding_besides(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """And equals that of one process, with a matrix of its own as head and a vocabulary that grows by a block of rows."""
    full = {
        "vocab_size": 512,
        "untie_embeddings_and_output_weights": True,
        "lr_decay_samples": 80,
        "micro_batch_size": 2,
    }
    pools(2).run(jobs.train, "ar", jobs.flags(token_files, tmp_path / "ar", train_iters=2, tp_size=2, **full))
    found = {}
    for size, options in ((1, {}), (4, layout)):
        load = {"finetune": True, "load": tmp_path / "ar", "save": tmp_path / f"mdm{size}", "train_iters": 4}
        found[size] = pools(size).run(train_counted, jobs.flags(token_files, **load, **full, **options))
    assert "the mask token starts as the mean" in pools(4).output(0)
    for read in found[4]:
        assert read.losses == pytest.approx(found[1][0].losses, abs=TOLERANCE, rel=0)
    saved = CheckpointReader(tmp_path / "ar" / "global_step2").specs
    weights = 4 * sum(torch.Size(spec.full_shape).numel() for spec in saved.values())
    embedding = 4 * torch.Size(saved["word_embeddings.weight"].full_shape).numel()
    reads = [read.num_bytes for read in found[4]]
    assert (
        weights + embedding <= sum(reads) <= 1.01 * weights + embedding
    )  # norms are whole on each tensor-parallel rank
    # Of the rows that are new nothing is read, so those who hold others read more than a quarter.
    assert max(reads[0] - embedding, *reads[1:]) < 1.25 * weights / 4
