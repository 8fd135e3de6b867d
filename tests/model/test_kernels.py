"""FlashAttention 3 and 4 by PyTorch's switch: refused where it cannot be had or would do nothing, and off again at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import attention

from megatron.commands.environment import flash_attention
from megatron.config import option
from megatron.errors import UserError
from megatron.model import kernels
from megatron.model.kernels import attention_kernels, check_flash, flash_obstacle
from megatron.model.mask import BlockDiffusion, Causal, Full, RandomKeyDrop, within_segments
from megatron.training import main

FITTING = ["--bf16", "--attention-dropout", "0"]


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A machine with a Hopper GPU and both packages, whose kernels are none; gives what was switched on and off."""
    told: list[str] = []

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name
            told.append(f"{name} on")

        def remove(self) -> None:
            told.append(f"{self.name} off")

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    before = {name: attention._registry._FLASH_ATTENTION_IMPLS.get(name) for name in ("FA3", "FA4")}
    for name in before:
        attention.register_flash_attention_impl(name, register_fn=lambda name=name: Handle(name))
    yield told
    attention._registry._FLASH_ATTENTION_IMPLS.update(before)


@pytest.mark.parametrize("backend", ["fa3", "fa4"])
def test_a_run_is_switched_on_and_off(
    switched: list[str], backend: str, token_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every process, before any group: the run sees PyTorch's flash kernels replaced, and cuDNN's out of their way."""
    seen: list[tuple[str | None, bool]] = []

    def run(*_: object) -> int:
        seen.append((attention.current_flash_attention_impl(), torch.backends.cuda.cudnn_sdp_enabled()))
        return 0

    monkeypatch.setattr(main, "_run", run)
    argv = ["--model", "7M", "--seq-length", "32", "--train-samples", "8", "--tokenizer-type", "NullTokenizer"]
    argv += ["--vocab-size", "500", "--train-data-path", str(token_files / "train"), "--save", str(tmp_path / "run")]
    assert main.main("mdm", [*argv, *FITTING, "--attention-backend", backend]) == 0
    assert main.main("mdm", [*argv, *FITTING]) == 0
    name = backend.upper()
    assert seen == [(name, False), (None, True)] and switched == [f"{name} on", f"{name} off"]
    assert flash_attention().found == "fa3, fa4: there"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--attention-backend would have no effect; it needs --bf16"),
        (
            ["--bf16"],
            "fa3 with --attention-dropout 0.1; FlashAttention 3 and 4 have no dropout; pass --attention-dropout 0",
        ),
        ([*FITTING, "--reset-attention-mask"], "no effect: attention of this training is WithinSegments"),
        ([*FITTING, "--random-length-ratio", "0.1"], "no effect: attention of this training is WithinSegments"),
        (
            [*FITTING, "--objective", "block_diffusion", "--block-size", "8"],
            "no effect: attention of this training is BlockDiffusion",
        ),
        ([*FITTING, "--kv-channels", "320"], "with heads of 320; FA3 takes at most 256"),
    ],
)
def test_what_has_no_effect_is_refused(
    switched: list[str], words: list[str], message: str, token_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_run", lambda *_: pytest.fail("it began"))
    argv = ["--model", "7M", "--seq-length", "32", "--train-samples", "8", "--tokenizer-type", "NullTokenizer"]
    argv += ["--vocab-size", "500", "--train-data-path", str(token_files / "train"), "--attention-backend", "fa3"]
    with pytest.raises(UserError) as refused:
        main.main("mdm", [*argv, *words], raise_errors=True)
    assert message in str(refused.value) and switched == []


def test_masks_and_heads_that_each_takes() -> None:
    for mask in (RandomKeyDrop(0.5, 1), BlockDiffusion(4), within_segments(Causal())):
        with pytest.raises(UserError, match="would have no effect"):
            check_flash("fa4", mask, head_size=64)
    with pytest.raises(UserError, match="FA4 takes at most 128"):
        check_flash("fa4", Full(), head_size=192)
    check_flash("sdpa", BlockDiffusion(4), head_size=512)


def test_a_machine_without_it_is_told_what_it_lacks(switched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash_obstacle("fa3") is flash_obstacle("fa4") is None
    monkeypatch.setitem(option.PACKAGES, "fa4", "flash_attn.other")  # as in version 2 of the package
    assert flash_obstacle("fa4") == "the package flash_attn.other is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert flash_obstacle("fa3") == "the device has compute capability 10.0, and it runs on 9.x"
    assert flash_attention().found.startswith("fa3: the device has compute capability 10.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--attention-backend fa3, but there is no CUDA device"):
        check_flash("fa3", Causal(), head_size=64)
    monkeypatch.delattr(attention, "list_flash_attention_impls")
    assert flash_obstacle("fa3") == f"torch {torch.__version__} has no switch to it"


def test_this_machine_refuses_in_words() -> None:
    """Nothing is faked: no package or no device, and either is said."""
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    assert flash_obstacle("fa3") in ("there is no CUDA device", f"torch {torch.__version__} has no switch to it")
    argv = ["--model", "7M", "--train-samples", "8", *FITTING, "--attention-backend", "fa3"]
    if not option.is_installed("fa3"):
        with pytest.raises(UserError, match=r"flash_attn_interface is not installed; .*install.sh --with fa3"):
            main.main("ar", argv, raise_errors=True)


def test_a_package_that_does_not_fit_torch_is_the_users(switched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("does not expose FA4 kernels")

    attention.register_flash_attention_impl("FA4", register_fn=refuse)
    with pytest.raises(UserError, match=r"cannot use flash_attn.cute \(does not expose"), attention_kernels("fa4"):
        pytest.fail("it began")
    assert torch.backends.cuda.cudnn_sdp_enabled() and "flash_attn" not in sys.modules
    assert kernels.FLASH["fa4"].name == "FA4"
