"""What the tests of several packages share: worker pools, small data sets, and one thread per process."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

gc.disable()  # what is imported and collected stays; see pytest_collection_finish
# Several processes share the cores, and one thread keeps sums in one order. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup, or in the background of a script, Ctrl-C and a closed terminal are ignored, which programs that are started would
# inherit: a handler is not inherited. It does here what was done before.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

if TYPE_CHECKING:
    from layouts.jobs import Run
    from layouts.pool import WorkerPool


# Minutes in few tests: first, that no process ends alone with one of them. The number of its tests, by which xdist would order
# groups, says little of how long one takes.
LONG = (
    "pools", "test_documented_commands.py", "test_laptop.py", "test_search_kills.py", "test_search.py", "test_stopping.py",
    "test_layouts.py", "test_exits.py", "test_uniform_diffusion.py", "test_statistics.py", "test_laws.py",
    "test_command_lines.py", "test_sweep_torchrun.py", "test_gpu_day.py", "test_kill_storm.py", "test_blocks.py", "test_tools.py",
    "test_lm_eval.py", "test_lm_eval_requests.py", "test_failures.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Groups begin in the order of the tests, which :func:`pytest_collection_modifyitems` makes."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before the worker of xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip themselves where there is none; tests that share worker pools stay in one process; long groups
    come first."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.pluginmanager.hasplugin("xdist"):
        kind: dict[pytest.Item, str] = {}
        for item in items:
            shares_pools = "pools" in getattr(item, "fixturenames", ())
            # A file stays together for what its tests share; jobs of their own share nothing and take long.
            whole = item.nodeid if item.path.name == "test_exits.py" else str(item.path)
            item.add_marker(pytest.mark.xdist_group("pools" if shares_pools else whole))
            kind[item] = "pools" if shares_pools else item.path.name
        items.sort(key=lambda item: LONG.index(kind[item]) if kind[item] in LONG else len(LONG))  # stable


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """``pools(n)``: the pool of n gloo workers, started when first asked for and kept for the session."""
    from layouts.pool import WorkerPool

    started: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        return started.setdefault(size, WorkerPool(size))

    yield pool
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def token_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` and ``valid``: documents of random ids below 500, one epoch of 640 samples of 32 tokens."""
    import numpy as np

    from megatron.data.prepare.writer import IndexedDatasetWriter

    folder = tmp_path_factory.mktemp("tokens")
    random = np.random.default_rng(0)
    for name, num_documents in (("train", 300), ("valid", 60)):
        with IndexedDatasetWriter(folder / name, np.dtype(np.uint16)) as writer:
            for size in random.integers(20, 120, num_documents):
                # Squared uniform ids: a skewed unigram distribution, so that the loss has something to learn.
                writer.add_document((499 * random.random(size) ** 2).astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def runs(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """``runs(objective, size, **flags)``: a short run on ``size`` processes; tests that ask for the same one share it."""
    from layouts import jobs

    finished: dict[tuple, jobs.Run] = {}

    def run(objective: str, size: int = 1, **changes: object) -> jobs.Run:
        key = (objective, size, tuple(sorted(changes.items())))
        if key not in finished:
            run_dir = tmp_path_factory.mktemp(f"{objective}_{size}_")
            argv = jobs.flags(token_files, run_dir, **changes)
            traces = pools(size).run(jobs.train, objective, argv, ("weights", "tensors"))
            assert [trace.status for trace in traces] == [0] * size
            has_validation = "valid_data_path" in changes
            valid = jobs.records(run_dir, "valid") if has_validation else {}
            finished[key] = jobs.Run(traces, jobs.records(run_dir), valid, run_dir)
        return finished[key]

    return run
