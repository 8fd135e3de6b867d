"""What DeepSpeed needs of a process before it builds an engine."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch.distributed as dist

from megatron.parallel.context import ParallelContext


def adopt_process_groups(context: ParallelContext) -> None:
    """Hand the default process group to DeepSpeed, quietly, and without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)
    os.environ.setdefault("LOCAL_RANK", str(context.device.index or 0))
    # DeepSpeed broadcasts tied weights, which are leaves, once at start-up; torch warns about their gradient.
    warnings.filterwarnings("ignore", message="c10d::broadcast_")
    import deepspeed

    # Its information lines bury the progress of a run; its import resets the level.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if context.device.type == "cpu":
        # On CPU DeepSpeed would compile a shared-memory operator at this point: minutes, and a lock that outlives a kill.
        backend_module = sys.modules["deepspeed.comm.torch"]
        assert hasattr(backend_module, "build_shm_op"), "deepspeed changed; see FACTS on 0.19.8"
        backend_module.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend="gloo" if context.device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
    )


class TensorParallelGroups:
    """The methods that DeepSpeed asks of a Megatron ``mpu``, answered by the context. Without tensor parallelism it needs
    none."""

    def __init__(self, context: ParallelContext) -> None:
        self._tp, self._dp = context.tp, context.dp
        # DeepSpeed wants a real group, also of size one.
        self._dp_group = context.dp.group or _own_group(context)

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_model_parallel_group(self) -> Any:
        return self._tp.group

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group(self) -> Any:
        return self._dp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _own_group(context: ParallelContext) -> Any:
    """A group of this process alone; every process takes part in making each."""
    groups = [dist.new_group([rank]) for rank in range(context.world_size)]
    return groups[context.rank]
