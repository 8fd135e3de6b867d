"""Lets torch and Triton take this machine for one with an H100, as far as compiling goes: kernels are built by ptxas for
sm_90 and never run. For a torch of the CPU, with ``device.cpp`` preloaded, and a process of its own: nothing is put back.

Tensors are fake, so there is nothing to compute; what would ask a driver is answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85_000_000_000,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32,
    L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip


class Hopper:
    """The machine.

    Attributes:
        kernels: names of the Triton kernels that were built.
        faults: what could not be, by kernel.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.faults: list[str] = []
        _answer_for_cuda()
        _answer_for_triton()
        _answer_for_inductor()
        self._build_only()

    def _build_only(self) -> None:
        """Every configuration of a kernel is built; none is timed or run."""
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from torch._inductor.select_algorithm import AlgorithmSelectorCache

        def precompile(kernel: Any, *_: Any, **__: Any) -> None:
            name, built = kernel.fn.__name__, 0
            for config in kernel.configs:
                try:
                    kernel._precompile_config(config)
                    built += 1
                except Exception as error:  # a configuration may ask for more than there is; one must not
                    fault = f"{name}: {type(error).__name__}: {str(error)[:300]}"
            self.kernels += [name] * bool(built)
            self.faults += [] if built else [fault]

        CachingAutotuner.precompile = precompile
        CachingAutotuner.run = _nothing
        AlgorithmSelectorCache.benchmark = classmethod(lambda *_, **__: {})  # the first choice is taken


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for what would touch a device."""


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _answer_for_cuda() -> None:
    cuda = torch.cuda
    for name, answer in {
        "is_available": True, "get_device_properties": H100, "get_device_capability": (9, 0), "current_device": 0,
        "device_count": 1, "is_initialized": False, "is_bf16_supported": True, "set_device": None, "synchronize": None,
        "_lazy_init": None,
    }.items():  # fmt: skip
        setattr(cuda, name, _always(answer))
    cuda._DeviceGuard.__enter__ = _nothing
    cuda._DeviceGuard.__exit__ = _nothing
    torch._C._cuda_getCurrentRawStream = _always(0)


def _answer_for_triton() -> None:
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    limits |= {"sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}

    class Driver:
        utils = SimpleNamespace(get_device_properties=_always(limits))
        is_active = staticmethod(_always(True))
        get_current_target = staticmethod(_always(GPUTarget("cuda", 90, 32)))
        get_current_device = get_current_stream = staticmethod(_always(0))
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_interface = staticmethod(_always(torch.cuda))

    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(Driver())
    torch.cuda.is_available = _always(False)  # from here on only inductor is told otherwise


def _answer_for_inductor() -> None:
    import torch._inductor.config as settings
    from torch._dynamo.device_interface import CudaInterface

    settings.compile_threads, settings.size_asserts, settings.alignment_asserts = 1, False, False
    settings.joint_graph_constant_folding = False  # it would compute
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )  # the one of C++ would see what is below a fake tensor
    guards.assert_size_stride = _nothing
    for name, answer in {
        "is_bf16_supported": True, "get_compute_capability": 90, "current_device": 0, "get_device_properties": H100,
        "is_available": True, "is_triton_capable": True, "raise_if_triton_unavailable": None, "synchronize": None,
    }.items():  # fmt: skip
        setattr(CudaInterface, name, staticmethod(_always(answer)))
    CudaInterface.Worker.get_device_properties = staticmethod(_always(H100))
    CudaInterface.Worker.current_device = staticmethod(_always(0))
