"""Preflight: does a run fit on GPUs that are not there? Its state is counted in deepspeed/test_memory.py, its activations in
tests/model/test_memory.py; here what is made of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import jobs

from megatron.commands.preflight import main as preflight
from megatron.errors import UserError
from megatron.model.arithmetic import DEVICES
from megatron.model.gpt import build_layers
from megatron.objectives import parse
from megatron.parallel.tensor import ParameterFactory
from megatron.training.layouts import flags_of, remedies, suggestions
from megatron.training.main import main
from megatron.training.preflight import (
    Case,
    case_of,
    changed,
    checkpoint_bytes,
    fits,
    footprints,
    held_by,
    host_bytes,
    num_parameters,
)
from megatron.training.roofline import Cluster, step_seconds

H100 = DEVICES["H100"]
GIB = 2**30


def case(*, world: int = 8, objective: str = "mdm", **changes: Any) -> Case:
    """A run of the published recipe without dropout; four micro-batches a step."""
    flags = {
        "model": "2298M",
        "bf16": True,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "micro-batch-size": 8,
        "train-iters": 100,
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    replicas = world // (int(flags.get("tp-size", 1)) * int(flags.get("pp-size", 1)))
    flags.setdefault("global-batch-size", 4 * replicas * int(flags["micro-batch-size"]))
    words = [
        word
        for name, value in flags.items()
        if value is not False
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    return case_of(parse(words, objective=objective, world_size=world), world)


RECOMPUTED = {"recompute_activations": True}
# World and flags: the layouts of a study on paper, from one GPU's worth to eight nodes.
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (8, {"model": "140M"}),
    (8, {"model": "425M"}),
    (8, {"model": "1143M", "zero_stage": 3, "micro_batch_size": 4}),
    (8, {}),
    (8, RECOMPUTED),
    (8, {"micro_batch_size": 4}),
    (8, {"zero_stage": 2, **RECOMPUTED}),
    (8, {"tp_size": 2, "pp_size": 2, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "4516M", "zero_stage": 2, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "6796M", "zero_stage": 3, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "6796M", "tp_size": 4, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "9293M", "zero_stage": 3, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "16183M", "zero_stage": 3, "micro_batch_size": 4, **RECOMPUTED}),
    (8, {"model": "16183M", "tp_size": 8, "micro_batch_size": 4, **RECOMPUTED}),
    (32, {"model": "16183M", "tp_size": 8, "micro_batch_size": 4, **RECOMPUTED}),
    (32, {"model": "16183M", "tp_size": 8, "pp_size": 2, "micro_batch_size": 2, **RECOMPUTED}),
    (64, {"model": "16183M", "zero_stage": 3, "micro_batch_size": 4, **RECOMPUTED}),
]


def test_seventeen_layouts_in_twenty_seconds() -> None:
    """Of this process, so that a busy machine fails nothing."""
    started = time.process_time()
    found = [footprints(case(world=world, **flags))[0] for world, flags in LAYOUTS]
    assert len(found) == 17
    assert time.process_time() - started < 20
    assert all(5 * GIB < each.total < 100 * GIB for each in found)


def test_2298M_in_fp32_does_not_fit_and_recomputation_makes_it() -> None:
    """dp 8, ZeRO 1, micro-batch 8, sequence 2048, as the flags are by default."""
    run = case(bf16=False, zero_stage=1)
    assert not fits(run, H100)
    assert fits(dict(remedies(run))["--recompute-activations"], H100)


def test_2298M_in_bf16_fits_until_the_micro_batch_is_16_and_recomputation_makes_that_fit() -> None:
    assert fits(case(), H100) and fits(case(no_compile=True), H100)
    run = case(micro_batch_size=16)
    assert not fits(run, H100)
    found = {name: fits(other, H100) for name, other in remedies(run)}
    assert found["--recompute-activations"] and found["--micro-batch-size 8"]
    assert not found["--zero-stage 2"]


def test_parts_are_those_of_the_engine_and_nothing_is_counted_twice() -> None:
    run = case()
    fullest = footprints(run)[0]
    state = held_by(run, 0).forward
    assert {name: fullest.parts[name] for name in state} == state
    assert set(fullest.parts) == {*state, "activations", "head", "rotary", "runtime"}
    per_parameter = sum(held_by(run, 0).between.values()) / num_parameters(run)
    assert per_parameter == pytest.approx(6 + 12 / 8, rel=1e-3)


@pytest.mark.parametrize(("zero", "bytes"), [(1, 6 + 12 / 8), (2, 2 + 16 / 8)])
def test_bytes_a_parameter_in_the_backward_pass(zero: int, bytes: float) -> None:
    run = case(zero_stage=zero)
    held = held_by(run, 0).backward
    assert (sum(held.values()) - held["buckets"]) / num_parameters(run) == pytest.approx(bytes, rel=1e-3)


def test_the_fullest_stage_of_a_pipeline_is_the_first_or_the_one_with_the_head() -> None:
    run = case(pp_size=4, world=4)
    found = {each.stage: each for each in reversed(footprints(run))}
    activations = [found[stage].parts.get("activations", 0) for stage in range(4)]
    assert activations == sorted(activations, reverse=True)  # stage s has 4 − s micro-batches in flight
    assert found[3].parts["head"] > 0 and footprints(run)[0].stage in (0, 3)


def test_a_changed_layout_is_the_same_run_or_none() -> None:
    run = case()
    other = changed(run, tensor_model_parallel_size=2, micro_batch_size=4)
    assert other is not None
    assert (other.layout.dp_size, other.layout.num_micro_batches) == (4, 16)
    assert other.layout.global_batch_size == run.layout.global_batch_size == 256
    assert changed(run, tensor_model_parallel_size=3) is None
    assert changed(run, zero_stage=3, tensor_model_parallel_size=2) is None
    assert changed(run, micro_batch_size=7) is None


@pytest.mark.parametrize(("zero", "bytes"), [(1, 2 + 4), (3, 0 + 4)])
def test_bytes_a_parameter_of_fsdp2_behind_the_forward_pass(zero: int, bytes: float) -> None:
    """Weights where they are kept, and whole sums of earlier micro-batches; masters and moments are cut by eight."""
    run = case(engine="fsdp2", zero_stage=zero)
    held = held_by(run, 0)
    ends = num_parameters(run) * 2 * (zero == 3)  # at most: two of many blocks, and what is outside
    found = sum(held.forward.values()) - sum(held.between.values())
    assert bytes * num_parameters(run) * 0.999 <= found <= bytes * num_parameters(run) * 1.001 + ends
    assert sum(held.between.values()) / num_parameters(run) == pytest.approx(12 / 8, rel=1e-3)
    assert run.is_compiled
    other = changed(run, zero_stage=3, tensor_model_parallel_size=2)
    assert other is not None  # which DeepSpeed refuses
    assert sum(held_by(other, 0).between.values()) == pytest.approx(sum(held.between.values()), rel=1e-3)
    assert changed(run, pipeline_model_parallel_size=2) is None


def test_suggested_layouts_fit_and_are_accepted_and_the_fastest_comes_first() -> None:
    run = case(model="6796M", world=16, global_batch_size=128)
    found = suggestions(run, Cluster(H100))
    assert len(found) > 20
    assert all(fits(each.case, H100) for each in found)
    assert [each.seconds for each in found] == pytest.approx(sorted(each.seconds for each in found), abs=1e-4)
    common = ["--model", "6796M", "--bf16", "--global-batch-size", "128", "--train-iters", "10"]
    for each in found[:10]:
        parse([*common, *flags_of(each.case).split()], objective="mdm", world_size=16)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (3, {"pp_size": 3, "micro_batch_size": 1, "global_batch_size": 256, "model": "6796M"}),
        (10, {"pp_size": 5, "global_batch_size": 256, "model": "425M"}),
        (6, {"micro_batch_size": 5, "global_batch_size": 90, "model": "425M"}),
        (
            24,
            {
                "tp_size": 4,
                "pp_size": 6,
                "micro_batch_size": 12,
                "global_batch_size": 96,
                "recompute_activations": True,
            },
        ),
    ],
)
def test_a_layout_that_fits_is_among_those_suggested(world: int, flags: dict[str, Any]) -> None:
    """Also where counts of GPUs, stages or samples are no powers of two."""
    run = case(world=world, **flags)
    assert fits(run, H100)
    found = [flags_of(each.case) for each in suggestions(run, Cluster(H100))]
    assert flags_of(run) in found and len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (8, ["--model", "425M", "--bf16", "--recompute-activations", "--tensor-model-parallel-size", "2"]),
        (6, ["--model", "6796M", "--micro-batch-size", "6", "--pipeline-model-parallel-size", "2"]),
        (4, ["--model", "2298M", "--micro-batch-size", "8", "--engine", "fsdp2", "--zero-stage", "3"]),
    ],
)
def test_flags_of_a_layout_behind_those_of_the_run_are_that_layout(world: int, words: list[str]) -> None:
    """Also where the run has another layout than the default, and where its global batch follows from it."""
    words += ["--train-iters", "10", "--attention-dropout", "0"]
    run = case_of(parse(words, objective="mdm", world_size=world), world)
    found = [(flags_of(each.case), each.case) for each in suggestions(run, Cluster(H100))] + [*remedies(run)]
    assert any("--recompute-activations false" in flags for flags, _ in found) == ("--recompute-activations" in words)
    for flags, other in found:
        again = case_of(parse([*words, *flags.split()], objective="mdm", world_size=world), world)
        assert (again.config, again.layout) == (other.config, other.layout)


def test_what_helps_is_smaller_and_an_optimizer_in_host_memory_is_among_it() -> None:
    """Of one GPU, where no ZeRO stage cuts anything."""
    run = case(model="6796M", world=1, micro_batch_size=1, **RECOMPUTED)
    found = dict(remedies(run))
    assert list(found) == ["--cpu-optimizer"] and fits(found["--cpu-optimizer"], H100) and not fits(run, H100)
    assert "--micro-batch-size 3" in dict(remedies(case(micro_batch_size=9)))
    odd = case(model="425M", kv_channels=64, num_attention_heads=15, ffn_hidden_size=3402, world=12)
    assert "--tensor-model-parallel-size 3" in dict(remedies(odd))


@pytest.mark.parametrize(
    ("model", "objective", "micro", "seconds", "gib"),
    [
        ("140M", "ar", 8, 0.183, 9.9),
        ("140M", "mdm", 8, 0.195, 9.9),
        ("425M", "ar", 8, 0.409, 20.9),
        ("425M", "mdm", 8, 0.421, 20.9),
        ("2298M", "mdm", 4, 0.927, 55.7),
    ],
)
def test_time_and_memory_are_near_what_one_h100_took(
    model: str, objective: str, micro: int, seconds: float, gib: float
) -> None:
    """docs/benchmarks.md, "One H100"; four micro-batches a step."""
    run = case(model=model, objective=objective, world=1, micro_batch_size=micro, global_batch_size=4 * micro)
    assert sum(step_seconds(run, Cluster(H100)).values()) == pytest.approx(seconds, rel=0.05)
    found = footprints(run)[0]
    assert (found.total - found.parts["runtime"]) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(("objective", "flags"), [("mir_ar", {}), ("mdm", {"complementary_masks": True})])
def test_a_second_view_of_each_sample_is_computed_and_kept(objective: str, flags: dict[str, Any]) -> None:
    """As twice the micro-batch would be, in half as many steps of accumulation."""
    plain, cluster = "ar" if objective == "mir_ar" else objective, Cluster(H100)
    two = case(model="425M", objective=objective, **flags)
    one = case(model="425M", objective=plain, micro_batch_size=16, global_batch_size=4 * 8 * 16)
    assert two.flops_per_token == pytest.approx(2 * case(model="425M", objective=plain).flops_per_token, rel=1e-3)
    assert [each.total for each in footprints(two)] == [each.total for each in footprints(one)]
    assert step_seconds(two, cluster) == pytest.approx(step_seconds(one, cluster), rel=1e-3)


def test_what_slows_a_layout_down_shows() -> None:
    plain, cluster = case(), Cluster(H100)
    parts = step_seconds(plain, cluster)
    assert parts["tensor"] == parts["bubble"] == 0
    recomputed = step_seconds(case(recompute_activations=True), cluster)
    assert recomputed["blocks"] == pytest.approx(4 / 3 * parts["blocks"])
    assert step_seconds(case(tp_size=2), cluster)["tensor"] > 0
    assert step_seconds(case(pp_size=2), cluster)["bubble"] > 0
    slow = Cluster(H100, network=1e9)
    assert step_seconds(case(world=16), slow)["gradients"] > step_seconds(case(world=16), cluster)["gradients"]


def test_checkpoint_and_host_memory_follow_the_model() -> None:
    run = case()
    assert checkpoint_bytes(run) == 12 * num_parameters(run)
    host = host_bytes(run, 8)
    largest = run.shape.padded_vocab_size * run.shape.hidden_size  # the first rank draws it, and rounds it
    assert host["building"] == 2 * 4 * largest
    assert host["optimizer"] == 0
    offloaded = case(cpu_optimizer=True, zero_stage=2)
    assert host_bytes(offloaded, 8)["optimizer"] > 16 * num_parameters(run)
    assert footprints(offloaded)[0].total < footprints(case(zero_stage=2))[0].total


def test_an_average_is_saved_too() -> None:
    run, plain = case(ema_decay=0.999, async_save=True), case(async_save=True)
    assert checkpoint_bytes(run) == 16 * num_parameters(run) == pytest.approx(4 / 3 * checkpoint_bytes(plain))
    assert host_bytes(run, 8)["saving"] == pytest.approx(4 / 3 * host_bytes(plain, 8)["saving"])


def test_rotary_tables_are_counted_and_planned_without_memory() -> None:
    run = case()
    with torch.device("meta"):
        found = [layer.build() for layer in build_layers(run.shape, ParameterFactory())[1:4]]
    (tables,) = {block.self_attention.rotary for block in found}
    assert tables.cos.is_meta
    assert footprints(run)[0].parts["rotary"] == tables.cos.nbytes + tables.sin.nbytes
    learned = case(no_use_rotary_position_embeddings=True, max_position_embeddings=2048)
    assert footprints(learned)[0].parts["rotary"] == 0


def test_what_runs_elsewhere_is_planned_and_what_trains_nothing_is_not() -> None:
    assert case(attention_backend="fa3", optimizer="fusedadam").config.model.attention_backend == "fa3"
    with pytest.raises(UserError, match="--skip-train; preflight plans a training"):
        case(skip_train=True, valid_data_path="v")


def test_what_is_not_here_is_assumed_and_said(token_files: Any) -> None:
    run = case(train_iters=False, train_epochs=2, train_data_path="absent/prefix")
    assert run.tokens is None and len(run.notes) == 2
    here = case(model="7M", train_iters=False, train_epochs=2, train_data_path=f"{token_files}/train", seq_length=32)
    assert here.tokens is not None and 30_000 < here.tokens < 60_000


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"vocab_size": 500, "padded_vocab_size": 100}, "the padded vocabulary 100 is below the vocabulary 500"),
        ({"vocab_size": 500, "padded_vocab_size": 501, "tp_size": 2}, "501 is not divisible by tensor-parallel size 2"),
        ({"vocab_size": 512}, "the mask id 512 has no row"),
        ({"vocab_size": 500, "mask_token_id": 600}, "the mask id 600 has no row"),
        ({"lr_warmup_samples": 10**9}, "leaves nothing of the"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_samples": 10**9}, "does not fit"),
    ],
)
def test_what_a_run_refuses_preflight_refuses_too(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        case(model="7M", tokenizer_type="NullTokenizer", **{"vocab_size": 500, **flags})


def test_a_tokenizer_without_files_is_known_where_there_are_no_data() -> None:
    known = case(model="7M", tokenizer_type="ByteTokenizer")
    assert known.shape.padded_vocab_size == 384 and not known.notes


def test_a_checkpoint_is_asked_where_it_is_and_assumed_where_not(
    token_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shape and rows of its vocabulary, which a warm start enlarges; as the run that begins from it."""
    known = {"vocab_size": 512, "load": tmp_path / "ar", "finetune": True}
    absent = case_of(parse(jobs.flags(token_files, tmp_path / "mdm", **known), objective="mdm"), 1)
    assert absent.shape.padded_vocab_size == 640 and "is not here" in absent.notes[0]
    assert (
        main("ar", jobs.flags(token_files, tmp_path / "ar", vocab_size=512, train_iters=1, padded_vocab_size=576)) == 0
    )
    here = case_of(parse(jobs.flags(token_files, tmp_path / "mdm", **known), objective="mdm"), 1)
    assert here.shape.padded_vocab_size == 640 and not here.notes
    goes_on = {"vocab_size": 512, "load": tmp_path / "ar"}
    assert case_of(parse(jobs.flags(token_files, None, **goes_on)), 1).shape.padded_vocab_size == 576
    with pytest.raises(UserError, match="a checkpoint of another architecture: hidden_size 64"):
        case_of(parse(jobs.flags(token_files, None, hidden_size=32, **goes_on)), 1)
    capsys.readouterr()
    words = ["--gpus", "2", "--load", str(tmp_path / "ar"), "--use-checkpoint-args", "--train-iters", "5"]
    assert preflight(words) == 0
    assert "0.1191M parameters, ar, fp32 on 2 x H100" in capsys.readouterr().out


def test_muon_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="--optimizer muon"):
        case(model="140M", optimizer="muon")
