"""Loading for inference: any tag, the tokenizer, the objective; what cannot be loaded is said."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.tensors import save_full_checkpoint
from megatron.convert.run_folder import read_run
from megatron.data.identity import tokenizer_fingerprint
from megatron.data.tokenizer import hf_tokenizer
from megatron.errors import UserError
from megatron.inference.model import load_model
from tests.evaluation import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.build_tokenizer_file(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=600)) for name in ("ar", "mdm")
    }


def test_weights_tokenizer_and_mask(runs) -> None:
    loaded = load_model(runs["mdm"])
    assert (loaded.is_masked, loaded.mask_id, loaded.max_length) == (True, 600, 96)
    assert loaded.unused_ids == list(range(600, 640))
    assert loaded.source.endswith("global_step3")
    tensors = tiny.random_tensors(loaded.config)
    for name, tensor in loaded.model.tensors().items():
        torch.testing.assert_close(tensor, tensors[name])
    text = "Return the path of the file."
    assert loaded.require_tokenizer().decode(loaded.require_tokenizer().encode(text)) == text


def test_attention_follows_the_objective(runs) -> None:
    for name in ("ar", "mdm"):
        loaded = load_model(runs[name], tag="latest")
        tokens = torch.arange(10)[None]
        changed = tokens.clone()
        changed[0, -1] = 77
        with torch.inference_mode():
            same = torch.equal(loaded.logits(tokens)[0, 0], loaded.logits(changed)[0, 0])
        assert same == (name == "ar")
    with pytest.raises(ValueError, match="megatron_ar"):
        _ = load_model(runs["ar"]).mask_id


def test_dtype_changes_the_identity(runs) -> None:
    one, other = load_model(runs["ar"]), load_model(runs["ar"], dtype="bfloat16")
    assert next(other.model.parameters()).dtype == torch.bfloat16
    assert one.identity != other.identity != load_model(runs["mdm"]).identity
    with pytest.raises(ValueError, match="bfloat16"):
        load_model(runs["ar"], dtype="int8")


def test_a_missing_tokenizer_is_named_when_text_is_needed(runs, tmp_path, tokenizer) -> None:
    config = tiny.config_for("ar", tmp_path / "gone", vocab_size=600)
    loaded = load_model(tiny.make_run(tmp_path / "run", config))
    assert loaded.tokenizer is None
    with pytest.raises(ValueError, match="--tokenizer-model"):
        loaded.require_tokenizer()
    again = load_model(tmp_path / "run", tokenizer_options={"tokenizer_model": str(tokenizer)})
    assert again.require_tokenizer().vocab_size == 600


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(runs, tmp_path, tokenizer) -> None:
    """Its text would end in an index error; where it is the run's own (the file was replaced), text is refused only."""
    small = tiny.make_run(tmp_path / "small", tiny.config_for("ar", tokenizer, vocab_size=200))
    with pytest.raises(UserError, match=r"has 600 ids and the model rows for 256; .*; name that one"):
        load_model(small, tokenizer_options={"tokenizer_model": str(tokenizer)})
    with pytest.raises(UserError, match=r"no tokenizer .*has 600 ids"):
        load_model(small).require_tokenizer()


def test_a_tokenizer_that_became_another_one_is_refused(tmp_path, tokenizer) -> None:
    """The files of a run, or the data that named it, may be made anew: a prompt would be read as other tokens, without a word."""
    config = tiny.config_for("ar", tokenizer, vocab_size=600)
    own = tokenizer_fingerprint(hf_tokenizer(str(tokenizer)))
    for name, recorded, problem in (
        ("same", {"vocab_size": 600, "fingerprint": own}, ""),
        ("old", {"vocab_size": 600, "fingerprint": None}, ""),
        ("files", {"vocab_size": 600, "fingerprint": "0" * 32}, f"had fingerprint {'0' * 32} .now {own}"),
        ("size", {"vocab_size": 590, "fingerprint": None}, "had vocab_size 590 .now 600"),
    ):
        tensors = tiny.random_tensors(config)
        save_full_checkpoint(tmp_path / name, config, tensors, step=3, more={"tokenizer": recorded})
        loaded = load_model(tmp_path / name)
        assert (loaded.tokenizer is None) == bool(problem)
        if problem:
            with pytest.raises(
                UserError, match=rf"is not the tokenizer of the run, which {problem}.*--tokenizer-model"
            ):
                loaded.require_tokenizer()
            again = load_model(tmp_path / name, tokenizer_options={"tokenizer_model": str(tokenizer)})
            assert again.tokenizer is not None


def test_nothing_to_load(tmp_path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        load_model(tmp_path)


def test_averaged_weights_are_loaded_where_they_are_asked_for_or_were_the_best(tmp_path, tokenizer) -> None:
    config = tiny.config_for("ar", tokenizer, vocab_size=600)
    kinds = {kind: tiny.random_tensors(config, seed=seed) for seed, kind in enumerate(("weight", "ema"))}
    tiny.make_averaged_run(tmp_path, config, kinds)
    (tmp_path / "best.json").write_text('{"step": 3, "weights": "ema"}')
    for options, kind in (({}, "weight"), ({"kind": "ema"}, "ema"), ({"tag": "best"}, "ema"),
                          ({"tag": "best", "kind": "weight"}, "weight")):  # fmt: skip
        loaded = load_model(tmp_path, **options)
        assert loaded.source.endswith("(averaged weights)") == (kind == "ema")
        assert all(tensor.equal(kinds[kind][name]) for name, tensor in loaded.model.tensors().items())
    assert load_model(tmp_path).identity != load_model(tmp_path, kind="ema").identity  # caches must tell them apart
    assert read_run(tmp_path, kind="ema")[1]["word_embeddings.weight"].equal(kinds["ema"]["word_embeddings.weight"])


def test_averaged_weights_that_are_not_there_are_refused_in_words(runs) -> None:
    with pytest.raises(UserError, match=r"no averaged weights \(ema\).*--ema-decay.*--load-kind weight"):
        load_model(runs["ar"], kind="ema")
