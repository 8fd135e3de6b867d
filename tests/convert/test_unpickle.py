"""Hostile, damaged and foreign files: refused by name, and none of their code runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatron.convert.unpickle import Placeholder, load_pickled
from megatron.errors import UserError


class Bomb:
    """Unpickling it calls a function of the attacker's choice."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def replace_pickle(path: Path, program: bytes) -> Path:
    """Put another pickle into a torch archive."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    return path


def test_plain_contents_come_back(tmp_path: Path) -> None:
    value = {
        "tensor": torch.arange(6.0).view(2, 3).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "args": argparse.Namespace(a=1, dtype=torch.float32, size=torch.Size([2])),
        "ordered": OrderedDict(x=[1, (2.5, None)], y={"z": {1, 2}}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    loaded = load_pickled(save(tmp_path / "x.pt", value))
    assert torch.equal(loaded["tensor"], value["tensor"])
    assert loaded["half"].dtype == torch.bfloat16
    assert loaded["args"] == value["args"]
    assert loaded["ordered"] == value["ordered"]


@pytest.mark.parametrize("place", ["top", "in args", "in a list"])
def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    bomb = Bomb(os.system, f"touch {marker}")
    value = {"top": bomb, "in args": {"args": argparse.Namespace(x=bomb)}, "in a list": [torch.ones(2), [bomb]]}[place]
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system; only tensors"):
        load_pickled(save(tmp_path / "x.pt", value))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (Bomb(eval, "open('ran', 'w')"), "eval"),
        (Bomb(exec, "open('ran', 'w')"), "exec"),
        (Bomb(getattr, "", "join"), "getattr"),
        (Bomb(open, "ran", "w"), "open"),
        (Bomb(__import__, "os"), "__import__"),
        (Bomb(torch.load, "other.pt"), "torch.serialization.load"),
    ],
)
def test_builtins_and_loaders_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: Bomb, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name):
        load_pickled(save(tmp_path / "x.pt", {"weight": torch.ones(1), "other": bomb}))
    assert not (tmp_path / "ran").exists()


def test_all_refused_names_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"asks for builtins.eval, posix.system") as caught:
        load_pickled(save(tmp_path / "x.pt", [Bomb(os.system, "true"), Bomb(eval, "1")]))
    assert "safetensors" in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_other_pickle_protocols_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    """STACK_GLOBAL of protocol 4 takes its name from the stack, where no static list sees it."""
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(Bomb(os.system, "touch ran"), protocol=protocol)
    path = replace_pickle(save(tmp_path / "x.pt", {}), program)
    with pytest.raises(ValueError, match=r"asks for|cannot be read"):
        load_pickled(path)
    assert not (tmp_path / "ran").exists()


def test_allowed_classes_cannot_be_changed_by_a_file(tmp_path: Path) -> None:
    """BUILD with a slot state calls setattr on what is below it on the stack: here the class itself."""
    program = b"\x80\x02cargparse\nNamespace\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
    path = replace_pickle(save(tmp_path / "x.pt", {}), program)
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_pickled(path)
    assert not hasattr(argparse.Namespace, "evil")


def test_deepspeed_objects_become_placeholders_without_import(tmp_path: Path) -> None:
    program = b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}X\x05\x00\x00\x00scaleK\x08sb."
    loaded = load_pickled(replace_pickle(save(tmp_path / "x.pt", {}), program))
    assert isinstance(loaded, Placeholder)
    assert vars(loaded)["scale"] == 8


def test_unknown_class_of_a_library_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02cdeepspeed.runtime.engine\nDeepSpeedEngine\n)\x81."
    with pytest.raises(ValueError, match=r"asks for deepspeed.runtime.engine.DeepSpeedEngine"):
        load_pickled(replace_pickle(save(tmp_path / "x.pt", {}), program))


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    path = save(tmp_path / "x.pt", {"weight": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"truncated or damaged .* download or copy it again"):
        load_pickled(path)


def test_flipped_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"weight": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"checksum of its part"):
        load_pickled(path)


def test_every_flipped_bit_of_the_directory_is_one_message(tmp_path: Path) -> None:
    """Six kinds of errors of zipfile and torch kept their tracebacks: UnicodeDecodeError, NotImplementedError, ..."""
    path = save(tmp_path / "x.pt", {"weight": torch.zeros(4), "args": argparse.Namespace(a=1)})
    whole = path.read_bytes()
    places = [*range(4, 64), *range(whole.index(b"PK\x01\x02"), len(whole))]
    for place in places[::3]:
        for bit in range(0, 8, 2):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            path.write_bytes(bytes(content))
            with contextlib.suppress(UserError):
                load_pickled(path)


def test_foreign_files(tmp_path: Path) -> None:
    plain = tmp_path / "a.pt"
    plain.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match=r"not a torch zip checkpoint"):
        load_pickled(plain)
    legacy = tmp_path / "b.pt"
    torch.save({"weight": torch.ones(1)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch >= 1.6"):
        load_pickled(legacy)
    archive = tmp_path / "c.pt"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("readme", "hello")
    with pytest.raises(ValueError, match=r"not one that torch.save wrote"):
        load_pickled(archive)
    packed = tmp_path / "d.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("d/data.pkl", b"\0" * 100_000)
    with pytest.raises(ValueError, match=r"not one that torch.save wrote"):
        load_pickled(packed)
    empty = tmp_path / "e.pt"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"0 bytes"):
        load_pickled(empty)
