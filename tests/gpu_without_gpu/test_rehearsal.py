"""What of the nightly run needs no Triton, and the script that starts it up to there; the rest is no part of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu_without_gpu import check

HERE = Path(__file__).resolve().parent


def test_every_mask_and_the_head_are_rehearsed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of all masks with fake tensors; the head's kernels from inductor, built by the C++ compiler and run."""
    import torch._inductor.config  # seconds to load

    # Without vector instructions, which inductor would first try out for seconds, and a header that only many kernels repay.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert check.main(["--device", "cpu", "--only", "head", "model/*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{1 + len(check.MASKS)} of {1 + len(check.MASKS)} passed"
    head = next(line for line in lines if line.startswith("head "))
    assert int(head.split(" kernels")[0].split()[-1]) >= 2


def test_a_block_is_traced_with_a_dense_mask() -> None:
    assert check.main(["--device", "cpu", "--only", "block/segments", "--backend", "aot_eager"]) == 0


def test_a_check_that_fails_is_named_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.model import block

    def wrong(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(block, "silu_mul", wrong)
    assert check.main(["--device", "cpu", "--only", "model/full", "model/causal"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 2 and "RuntimeError at test_rehearsal.py" in out and "0 of 2 passed" in out


def test_wrong_use_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.main(["--device", "cpu", "--only", "nothing"]) == 2
    assert check.main(["--device", "cuda"]) == 2
    monkeypatch.setenv("LD_PRELOAD", "/tmp/device.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert check.main(["--device", "cuda"]) == 2
    told = capsys.readouterr().err
    assert "no check is named nothing" in told and "start nightly.sh" in told and "use one of the CPU" in told


def test_the_nightly_script_builds_the_device_and_preloads_it(tmp_path: Path) -> None:
    """With a program in Python's place, which the library is loaded into with those of torch that it needs."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    (tmp_path / "triton").mkdir()
    asks = f'case "$1" in -c) exec {sys.executable} "$@" ;; esac'
    program.write_text(f'#!/bin/sh\n{asks}\nls "$LD_PRELOAD"\necho "$@" "$PYTHONPATH"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = ["bash", str(HERE / "nightly.sh"), str(tmp_path), "--only", "head"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    library, given = done.stdout.splitlines()
    assert library.endswith("/device.so") and f"check.py --device cuda --only head {tmp_path}:" in given
    done = subprocess.run(["bash", str(HERE / "nightly.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no folder holds no Triton" in done.stderr


def test_names_that_are_replaced_for_a_gpu_are_still_there() -> None:
    """Of the private ones that the wheel of the CPU has too: a torch that renames them is seen before the night."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    names = {
        CachingAutotuner: ("precompile", "_precompile_config", "run"),
        AlgorithmSelectorCache: ("benchmark",),
        CudaInterface: (
            "is_bf16_supported",
            "get_compute_capability",
            "is_triton_capable",
            "raise_if_triton_unavailable",
        ),
        CudaInterface.Worker: ("get_device_properties", "current_device"),
        torch.cuda: ("_DeviceGuard", "_lazy_init", "get_device_properties"),
        torch._C._dynamo.guards: ("_reinterpret_tensor", "assert_size_stride"),
        torch._inductor.config: ("joint_graph_constant_folding", "size_asserts", "alignment_asserts"),
    }
    missing = [f"{place}.{name}" for place, wanted in names.items() for name in wanted if not hasattr(place, name)]
    assert not missing
