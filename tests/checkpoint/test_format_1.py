"""Checkpoints that the first version of the format left are read for ever: a run of it is kept as a fixture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.tensors import full_shapes, model_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "run_v1"
DIGESTS = {
    ("gpt", "weight"): "a4888d9408e2f51f",
    ("gpt", "exp_avg"): "6ff8e3332786d6dc",
    ("gpt", "exp_avg_sq"): "f769b00b0920d07d",
    ("mdm", "weight"): "717416c17cfbaa4e",
    ("mdm", "exp_avg"): "31101ed5997f754b",
    ("mdm", "exp_avg_sq"): "8314afc067097614",
}


@pytest.mark.parametrize("program", ["gpt", "mdm"])
def test_a_run_of_format_1_is_read(program: str) -> None:
    found = select(GOLDEN / program)
    assert found.tag is not None and found.manifest is not None
    assert (found.tag.name, found.manifest["format"], found.skipped) == ("global_step5", 1, ())
    position = ("step", "consumed_samples", "optimizer_steps", "best_step")
    assert [found.manifest[name] for name in position] == [5, 20, 5, 5]
    reader = CheckpointReader(found.tag)
    assert reader.config.objective.objective == {"gpt": "ar", "mdm": "mdm"}[program]
    specs = model_tensors(reader.config.model, num_tensors=len(reader.specs), source=program)
    assert full_shapes(reader.specs) == full_shapes(specs)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        digest = hashlib.sha256()
        for name in sorted(reader.specs):
            digest.update(reader.tensor(name, kind).numpy().tobytes())
        assert digest.hexdigest()[:16] == DIGESTS[program, kind]
