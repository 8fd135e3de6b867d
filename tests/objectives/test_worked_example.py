"""The worked example of docs/objectives.md: one file, one registry line, this test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool
from objective_helpers import (
    MASK_ID,
    SEQ,
    assert_same_batch,
    conditionals_of,
    make_objective,
    make_tokens,
    prepare,
    tiny_model,
    within_standard_errors,
)

from megatron.errors import UserError
from megatron.model.mask import Full
from megatron.objectives import OBJECTIVES
from megatron.objectives.base import BOUND, MaskedDecoding

FILE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "span_mdm.py"
NAME = "span_mdm"
MODULE = f"megatron.objectives.{NAME}"
LINE = {"span_mdm": "span_mdm.SpanMaskedDiffusion"}  # of the registry


def the_class() -> Any:
    """The objective of the file, imported once a process as if it lay in ``megatron/objectives``."""
    if MODULE not in sys.modules:
        spec = importlib.util.spec_from_file_location(MODULE, FILE)
        assert spec is not None and spec.loader is not None
        sys.modules[MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[MODULE])
    return sys.modules[MODULE].SpanMaskedDiffusion


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "places", {**OBJECTIVES.places, **LINE})
    assert the_class() is OBJECTIVES[NAME]


def train_it(argv: list[str]) -> jobs.Trace:
    """``jobs.train`` in a worker, with the registry line there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OBJECTIVES, "places", {**OBJECTIVES.places, **LINE})
        the_class()
        return jobs.train(NAME, argv)


def test_every_layout_trains_it_alike(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path) -> None:
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "tp2": (2, {"tp_size": 2}),
        "pp2": (2, {"pp_size": 2, "micro_batch_size": 2}),
        "dp2": (2, {}),
    }
    losses, valid = {}, {}
    for layout, (size, changes) in layouts.items():
        common = {"span_length": 4, "train_iters": 6, "valid_data_path": token_files / "valid", "eval_iters": 1}
        argv = jobs.flags(token_files, tmp_path / layout, **common, **changes)
        traces = pools(size).run(train_it, argv)
        assert [trace.status for trace in traces] == [0] * size
        losses[layout] = [trace.losses for trace in traces]
        record = jobs.records(tmp_path / layout, "valid")[6]
        assert record["label"] == BOUND
        valid[layout] = record["nll"]
    expected = losses["one"][0]
    assert len(set(expected)) == 6 and expected[-1] < 7
    for layout, ranks in losses.items():
        for found in ranks:
            assert found == pytest.approx(expected, abs=1e-5, rel=0), layout
    assert list(valid.values()) == pytest.approx([valid["one"]] * 4, abs=1e-5, rel=0)


def test_its_flag_is_in_the_help_and_belongs_to_it_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_objective("--help", "all")
    text = " ".join(capsys.readouterr().out.split())
    assert "--span-length TOKENS span_mdm: tokens that are masked together" in text
    assert "exact_count_mdm, block_diffusion, uniform_diffusion, dual, span_mdm: draw the diffusion time" in text
    for other in ("mdm", "ar"):
        with pytest.raises(UserError, match="--span-length with objective"):
            make_objective("--objective", other, "--span-length", "4")
    with pytest.raises(UserError, match="--ar-ratio with objective span_mdm"):
        make_objective("--objective", NAME, "--ar-ratio", "0.5")


@pytest.mark.parametrize("length", ["0", "-1", "1e12", str(SEQ + 1)])
def test_a_length_out_of_range_is_refused(length: str) -> None:
    with pytest.raises(UserError, match="--span-length"):
        make_objective("--objective", NAME, "--span-length", length)


def test_spans_of_one_token_are_masked_diffusion() -> None:
    one = make_objective("--objective", NAME, "--span-length", "1")
    assert_same_batch(
        prepare(one, make_tokens(16), torch.arange(16)), prepare(make_objective(), make_tokens(16), torch.arange(16))
    )


def test_tokens_of_a_span_share_their_fate() -> None:
    objective = make_objective("--objective", NAME, "--span-length", "4")
    is_masked = prepare(objective, make_tokens(4000), torch.arange(4000)).inputs.input_ids.numpy() == MASK_ID
    changes = is_masked[:, 1:] != is_masked[:, :-1]
    for row in changes[:200]:
        assert len(set(np.flatnonzero(row) % 4)) <= 1  # all ends of spans of a sample lie on one grid
    assert all(changes[:, first::4].any() for first in range(4))  # which is another one in other samples
    assert within_standard_errors(is_masked.reshape(-1, 8 * SEQ).mean(1), 0.5)


@torch.no_grad()
def test_the_label_is_honest() -> None:
    """The mean over the noise is the mean over offsets and orders of −log p of the model that fills whole spans."""
    model, tokens, length, span = tiny_model(Full(), vocab=8, seq=4), torch.tensor([2, 0, 4, 1, 3]), 4, 2
    losses = -conditionals_of(model, tokens[:length], 5).sum(-1)  # of the masked tokens, by the mask as a binary number

    def loss_of(hidden: set[int]) -> float:
        return float(losses[sum(1 << (length - 1 - place) for place in hidden)])

    by_order: list[float] = []
    weights: list[float] = []
    for offset in range(span):
        spans = [[i for i in range(length) if (i + offset) // span == n] for n in range(length)]
        orders = list(permutations([places for places in spans if places]))
        for order in orders:
            total = 0.0
            for done in range(len(order)):
                hidden = {i for places in order[done:] for i in places}
                later = hidden - set(order[done])
                total += loss_of(hidden) - _rest(model, tokens[:length], hidden, later)
            by_order.append(total)
            weights.append(1 / span / len(orders))
    bound = float(np.dot(weights, by_order)) / length
    objective = the_class()(mask_token_id=5, global_batch_size=16, seed=7, span_length=span)
    batch = prepare(objective, tokens.expand(16000, 5).contiguous(), torch.arange(16000))
    per_step = model.sample_losses(batch).double().numpy().reshape(-1, 16).mean(-1)
    assert within_standard_errors(per_step, bound)
    likelihood = -np.log(np.dot(weights, np.exp(-np.array(by_order)))) / length
    assert likelihood < bound and objective.label == BOUND


def _rest(model: Any, tokens: torch.Tensor, hidden: set[int], later: set[int]) -> float:
    """Cross-entropy of the tokens ``later`` while all of ``hidden`` are masked."""
    masked = tokens.clone()
    masked[sorted(hidden)] = 5
    log_probabilities = model.logits(masked[None])[0].double().log_softmax(-1)
    return -float(sum(log_probabilities[i, tokens[i]] for i in later))


def test_it_is_evaluated_and_decoded_as_masked_diffusion() -> None:
    objective, tokens, ids = make_objective("--objective", NAME), make_tokens(8), torch.arange(8)
    assert objective.decoding == MaskedDecoding(MASK_ID)
    assert_same_batch(prepare(objective.for_eval(), tokens, ids), prepare(make_objective().for_eval(), tokens, ids))
