"""What travels between the stages of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron.model.batch import Inputs, ModelBatch, Stream, Targets
from megatron.model.mask import AttentionMask, Full, PerSample, RandomKeyDrop, within_segments
from megatron.training.deepspeed.pipeline import fields, packed, pipeline_batches, stream_of
from megatron.training.engine import Mode


@dataclass
class Masked:
    """An objective, as far as a pipeline asks."""

    attention_mask: AttentionMask


IDS, SAMPLES, KINDS = torch.zeros(2, 8, dtype=torch.int64), torch.tensor([3, 4]), torch.tensor([1, 0])
PLACES = torch.arange(8).expand(2, 8).contiguous()
SEGMENTS = (PLACES >= 5).long()


@pytest.mark.parametrize(
    ("mask", "inputs", "names"),
    [
        (Full(), Inputs(IDS, None, SAMPLES), []),
        (Full(), Inputs(IDS, PLACES, SAMPLES), ["position_ids"]),
        (RandomKeyDrop(0.5, 1), Inputs(IDS, None, SAMPLES), ["sample_ids"]),
        (PerSample(0.5), Inputs(IDS, PLACES, SAMPLES, None, KINDS), ["position_ids", "is_causal"]),
        (within_segments(Full()), Inputs(IDS, None, SAMPLES), ["position_ids", "segment_ids"]),  # not cut: as if it were
        (within_segments(Full()), Inputs(IDS, PLACES, SAMPLES, SEGMENTS), ["position_ids", "segment_ids"]),
        (within_segments(RandomKeyDrop(0.5, 1)), Inputs(IDS, PLACES, SAMPLES, SEGMENTS),
         ["position_ids", "sample_ids", "segment_ids"]),
    ],
)  # fmt: skip
def test_only_what_masks_and_positions_need(mask: AttentionMask, inputs: Inputs, names: list[str]) -> None:
    mode = Mode(Masked(mask), within_documents=False)  # type: ignore[arg-type]
    batch = ModelBatch(inputs, Targets(IDS, IDS.float(), SAMPLES, SAMPLES.float()))
    ((tensors, labels),) = pipeline_batches(iter([batch]), mode, torch.device("cpu"))
    assert len(labels) == 4 and list(fields(tensors, mask)) == names
    stream = stream_of(tensors, mask)
    there = {name: getattr(stream, name) for name in Stream._fields[1:] if getattr(stream, name) is not None}
    assert list(there) == names
    for name, part in there.items():
        given = getattr(inputs, name)
        expected = {"position_ids": PLACES, "segment_ids": torch.zeros_like(IDS)}.get(name) if given is None else given
        assert torch.equal(part, expected)
    again = packed(stream, mask)
    assert all(a is b for a, b in zip(again if isinstance(again, tuple) else (again,), tensors))
