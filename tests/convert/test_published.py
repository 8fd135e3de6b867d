"""The published DeepSpeed-pipeline layout: golden checkpoint, every layout that we can write, and damaged ones."""

from __future__ import annotations

import argparse
import os
import resource
from pathlib import Path

import pytest
import torch

from megatron.config.shape import Shape
from megatron.convert.published import find_published, read_published
from megatron.convert.unpickle import load_pickled
from megatron.errors import UserError
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full
from tests.convert.reference import layer_files, make_config, plain_logits, random_tensors, write_published
from tests.convert.test_unpickle import Bomb

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ar_ckpt"


def ours(config, tensors, ids: torch.Tensor) -> torch.Tensor:
    mask = Full() if config.objective.objective == "mdm" else Causal()
    model = GPTModel(Shape.of(config.model))
    load_tensors(model, tensors)
    with torch.no_grad():
        return model.eval().logits(Inputs(ids), mask)


def test_golden_checkpoint() -> None:
    found = read_published(GOLDEN, objective="ar")
    model = found.config.model
    assert found.step == 20
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.kv_channels) == (3, 64, 4, 16)
    assert (model.ffn_hidden_size, model.padded_vocab_size, model.seq_length) == (128, 50304, 64)
    assert (found.config.data.vocab_size, found.config.data.tokenizer_type) == (50257, "GPT2BPETokenizer")
    assert found.config.data.vocab_file is None  # a path of the machine that wrote it
    assert not found.config.run.bf16


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_golden_logits_agree_with_plain_torch(objective: str) -> None:
    """All 50,304 logits of 2 x 64 tokens against an evaluation of the original files."""
    found = read_published(GOLDEN, objective=objective)
    tag = find_published(GOLDEN)
    layers = {layer: load_pickled(tag / f"layer_{layer:02d}-model_00-model_states.pt") for layer in range(1, 6)}
    ids = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = plain_logits(layers, ids, heads=4, kv=16, causal=objective == "ar")
    assert (ours(found.config, found.tensors, ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("untied", [False, True])
def test_every_layout_reads_back_bit_for_bit(tmp_path: Path, tp: int, dtype: torch.dtype, untied: bool) -> None:
    config = make_config("mdm", untie_embeddings_and_output_weights=untied, kv_channels=20)
    tensors = {name: tensor.to(dtype).float() for name, tensor in random_tensors(config.model).items()}
    found = read_published(write_published(tmp_path / "p", config, tensors, tp=tp, dtype=dtype), objective="mdm")
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert found.config.run.bf16 == (dtype == torch.bfloat16)
    assert found.config.objective.mask_token_id == 300
    assert found.config.model.untie_embeddings_and_output_weights == untied
    assert found.config.model.kv_channels == 20
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = plain_logits(layer_files(config, tensors), ids, heads=4, kv=20, causal=False)
    assert (ours(found.config, found.tensors, ids) - expected).abs().max() < 1e-5


def test_layernorm_gelu_biases_and_learned_positions(tmp_path: Path) -> None:
    changes = {"normalization": "layernorm", "swiglu": False, "disable_bias_linear": False}
    config = make_config(use_rotary_position_embeddings=False, **changes)
    tensors = random_tensors(config.model)
    for tp in (1, 2):
        found = read_published(write_published(tmp_path / str(tp), config, tensors, tp=tp), objective="ar")
        assert set(found.tensors) == set(tensors)
        positions = found.tensors["position_embeddings.weight"]
        assert torch.equal(positions[-1], positions[-2])
        tensors["position_embeddings.weight"][-1] = positions[-1]
        assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_listed_ffn_width_may_differ_from_the_real_one(tmp_path: Path) -> None:
    """Launch scripts list 4h; the reference code uses floor(8h/3/64)*64. Shapes decide, other widths are refused."""
    config = make_config(hidden_size=128, ffn_hidden_size=320)
    folder = write_published(tmp_path / "p", config, random_tensors(config.model))
    path = folder / "global_step7" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["args"].ffn_hidden_size = 512
    torch.save(state, path)
    assert read_published(folder, objective="ar").config.model.ffn_hidden_size == 320
    other = make_config(hidden_size=128, ffn_hidden_size=256)
    folder = write_published(tmp_path / "q", other, random_tensors(other.model))
    path = folder / "global_step7" / "mp_rank_00_model_states.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"256 wide, args says 512"):
        read_published(folder, objective="ar")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = make_config("mdm")
    return write_published(tmp_path / "published", config, random_tensors(config.model), tp=2) / "global_step7"


def edit(path: Path, change) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.dense_4h_to_h.weight"), r"missing layers.1.mlp.dense_4h_to_h.weight"),
        (lambda s: s.update({"mlp.extra": torch.ones(2)}), r"unknown layers.1.mlp.extra"),
        (lambda s: s.update({"rotary.inv_freq": torch.ones(2)}), r"unknown layers.1.rotary.inv_freq"),
        (
            lambda s: s.update({"input_layernorm.weight": torch.ones(7)}),
            r"input_layernorm.weight is \[7\], expected \[48\]",
        ),
        (lambda s: s.update({"input_layernorm.weight": torch.ones(48).long()}), r"not floating point"),
        (lambda s: s.update({"note": "hello"}), r"note is a str"),
    ],
)
def test_every_tensor_is_accounted_for(checkpoint: Path, change, message: str) -> None:
    for rank in range(2):
        edit(checkpoint / f"layer_03-model_{rank:02d}-model_states.pt", change)
    with pytest.raises(ValueError, match=message):
        read_published(checkpoint, objective="mdm")


def test_ranks_that_disagree(checkpoint: Path) -> None:
    path = checkpoint / "layer_02-model_01-model_states.pt"
    edit(path, lambda s: s["input_layernorm.weight"].add_(1))
    with pytest.raises(ValueError, match=r"input_layernorm.weight differs between tensor-parallel ranks"):
        read_published(checkpoint, objective="mdm")
    edit(path, lambda s: s.pop("input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"hold different tensors"):
        read_published(checkpoint, objective="mdm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer_03-model_01-model_states.pt", "missing layer_03-model_01-model_states.pt"),
        ("mp_rank_00_model_states.pt", "missing mp_rank_00_model_states.pt"),
    ],
)
def test_missing_files_are_named(checkpoint: Path, name: str, message: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=message):
        read_published(checkpoint, objective="mdm")


def test_a_missing_last_layer_and_a_missing_rank_are_noticed(checkpoint: Path) -> None:
    for rank in range(2):
        (checkpoint / f"layer_04-model_{rank:02d}-model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"2 blocks with a tied output head need files 1 to 4"):
        read_published(checkpoint, objective="mdm")


def test_all_files_of_a_rank_missing(checkpoint: Path) -> None:
    for path in checkpoint.glob("layer_*-model_01-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"files of 1 tensor-parallel ranks, args says 2"):
        read_published(checkpoint, objective="mdm")


def test_unknown_files(checkpoint: Path) -> None:
    (checkpoint / "layer_03-expert_1-model_states.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds layer_03-expert_1-model_states.pt"):
        read_published(checkpoint, objective="mdm")


@pytest.mark.parametrize(
    ("name", "value"),
    [("apply_layernorm_1p", True), ("rotary_percent", 0.5), ("num_experts", [8]), ("squared_relu", True)],
)
def test_variants_that_we_do_not_have_are_refused_by_name(checkpoint: Path, name: str, value: object) -> None:
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: setattr(s["args"], name, value))
    with pytest.raises(ValueError, match=f"args.{name} is"):
        read_published(checkpoint, objective="mdm")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "x", "the model cannot be derived"),
        ("train_samples", [], None),
        ("train_samples", "x", "the model cannot be derived"),
        ("ffn_hidden_size", [1], "the model cannot be derived"),
        ("num_experts", torch.ones(2), "the model cannot be derived"),
        ("normalization", "none", "normalization 'none'"),
        ("layernorm_epsilon", float("nan"), "--layernorm-epsilon is nan"),
        ("rope_theta", -1, "--rotary-base is -1"),
        ("num_attention_heads", None, "with None query heads"),
    ],
    ids=str,
)
def test_values_that_no_run_has_are_one_message(
    checkpoint: Path, name: str, value: object, message: str | None
) -> None:
    """Tracebacks, or models that were read and computed nonsense."""
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: setattr(s["args"], name, value))
    if message is None:
        read_published(checkpoint, objective="mdm")
        return
    with pytest.raises(UserError, match=message):
        read_published(checkpoint, objective="mdm")


@pytest.mark.parametrize("content", [3, [1], torch.ones(2), {1: torch.ones(2)}], ids=["int", "list", "tensor", "keys"])
def test_a_layer_file_that_holds_no_table_is_refused(checkpoint: Path, content: object) -> None:
    for rank in range(2):
        torch.save(content, checkpoint / f"layer_01-model_{rank:02d}-model_states.pt")
    with pytest.raises(UserError, match="layer_01 holds no table of tensors"):
        read_published(checkpoint, objective="mdm")


def stretched(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor that claims a shape with the storage of one element."""
    return tensor.reshape(-1)[:1].clone().expand(*shape)


@pytest.mark.parametrize("size", [10**10, 10**19, -1])
@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "padded_vocab_size", "seq_length", "kv_channels"])
def test_sizes_without_end_are_refused_before_memory_grows(checkpoint: Path, name: str, size: int) -> None:
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: setattr(s["args"], name, size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        read_published(checkpoint, objective="mdm")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    "name",
    [
        "layer_9999999999-model_00-model_states.pt",
        "layer_02-model_9999999999-model_states.pt",
        "layer_2-model_0-model_states.pt",
    ],
)
def test_a_file_name_that_claims_layers_without_end_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes((checkpoint / "layer_02-model_00-model_states.pt").read_bytes())
    with pytest.raises(UserError, match=r"is incomplete: missing layer_|holds layer_2-model_0"):
        read_published(checkpoint, objective="mdm")


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path: Path) -> None:
    config = make_config()
    folder = write_published(tmp_path / "p", config, random_tensors(config.model)) / "global_step7"
    edit(
        folder / "layer_01-model_00-model_states.pt",
        lambda s: s.update({"word_embeddings.weight": stretched(s["word_embeddings.weight"], 10**7, 10**5)}),
    )
    with pytest.raises(UserError, match=r"word_embeddings.weight claims \[10000000, 100000\] in 4 bytes"):
        read_published(folder, objective="ar")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(checkpoint: Path, value: float) -> None:
    edit(checkpoint / "layer_03-model_01-model_states.pt", lambda s: s["mlp.dense_4h_to_h.weight"][3].fill_(value))
    with pytest.raises(UserError, match=r"NaN or infinite values in layers.1.mlp.dense_4h_to_h.weight"):
        read_published(checkpoint, objective="mdm")


def test_a_vocabulary_without_a_row_for_the_mask_token_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: setattr(s["args"], "vocab_size", 384))
    with pytest.raises(UserError, match="the mask token of mdm another"):
        read_published(checkpoint, objective="mdm")
    assert read_published(checkpoint, objective="ar").config.data.vocab_size == 384


def test_grouped_query_attention_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: setattr(s["args"], "num_key_value_heads", 2))
    with pytest.raises(ValueError, match=r"args.num_key_value_heads is 2"):
        read_published(checkpoint, objective="mdm")


def test_args_are_needed(checkpoint: Path) -> None:
    edit(checkpoint / "mp_rank_00_model_states.pt", lambda s: s.pop("args"))
    with pytest.raises(ValueError, match=r"has no `args`"):
        read_published(checkpoint, objective="mdm")
    torch.save({"args": argparse.Namespace(num_attention_heads=4)}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"the model cannot be derived"):
        read_published(checkpoint, objective="mdm")


@pytest.mark.parametrize("name", ["layer_01-model_01-model_states.pt", "mp_rank_00_model_states.pt"])
def test_a_hostile_file_runs_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    edit(checkpoint / name, lambda s: s.update(x=Bomb(os.system, f"touch {marker}")))
    with pytest.raises(ValueError, match=rf"{name} asks for posix.system"):
        read_published(checkpoint, objective="mdm")
    assert not marker.exists()


def test_folders(checkpoint: Path, tmp_path: Path) -> None:
    run = checkpoint.parent
    assert find_published(run) == find_published(checkpoint) == checkpoint
    (run / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"latest names '.*', and .* has no such folder"):
        find_published(run)
    (run / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match=r"'../elsewhere'"):
        find_published(run)
    with pytest.raises(ValueError, match=r"neither"):
        find_published(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"objective 'diffusion'"):
        read_published(checkpoint, objective="diffusion")


def test_tokenizer_and_bookkeeping_of_optimizers_do_not_disturb(tmp_path: Path) -> None:
    config = make_config()
    extra = {"lr_scheduler": {"max_lr": 2e-4}, "ds_version": "0.15.0", "random_ltd": None, "ds_config": {"a": [1]}}
    folder = write_published(tmp_path / "p", config, random_tensors(config.model), **extra)
    assert read_published(folder, objective="ar").step == 7
