"""GPUs are known by exact name: a part of a name may be that of another one (H20 of H200, H100 of H100 NVL)."""

from __future__ import annotations

import pytest
import torch

from megatron.model.arithmetic import DEVICES, peak_flops

# What torch.cuda.get_device_name() gives, and the dense bf16 peak of the data sheet in TFLOP/s.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA H20": 148,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250,
    "NVIDIA B300 SXM6 AC": 2250,
}


@pytest.mark.parametrize(
    ("name", "peak"), [*PEAKS.items(), ("NVIDIA L40", None), ("NVIDIA H100 80GB", None), ("Tesla V100-SXM2-32GB", None)]
)
def test_peak_of_a_device_by_its_exact_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    found = peak_flops(torch.device("cuda"))
    assert found == (None if peak is None else peak * 1e12)
    assert peak_flops(torch.device("cpu")) is None


def test_no_name_is_listed_twice_and_every_figure_is_plausible() -> None:
    names = [name for device in DEVICES.values() for name in device.names]
    assert len(set(names)) == len(names) and set(PEAKS) <= set(names)
    for device in DEVICES.values():
        assert 100e12 < device.peak < 5e15
        assert 40_000 < device.memory_mib < 300_000
        assert 0.5e12 < device.bandwidth < 1e13 and 1e10 < device.link < 1e12
