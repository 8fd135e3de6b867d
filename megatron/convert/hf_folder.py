"""Whole Hugging Face folders: export of a model with its tokenizer, import, and the comparison of logits."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensors import check_tensors, full_shapes, model_tensors
from megatron.config.schema import Config, DataConfig
from megatron.config.shape import Shape
from megatron.convert.hf_config import huggingface_config, read_config, write_config
from megatron.convert.hf_tokenizer import end_of_document, tokenizer_size, write_tokenizer
from megatron.convert.huggingface import (
    CLASSES,
    DTYPES,
    attention_family,
    check_expressible,
    from_huggingface,
    huggingface_shapes,
    kept_rows,
    read_weights,
    to_huggingface,
    trim_rows,
    write_weights,
)
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import UserError
from megatron.files import replace_folder
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import AttentionMask, Causal, Full

CONFIG_FILES = ("config.json", "generation_config.json")
# fp32 logits of the same weights differ by rounding only; per unit of the largest logit where that is above 1.
LOGIT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: "float32", "bfloat16", "float16", or "auto": that of training.
        trim_vocab: drop the padding rows that no token uses.
        tokenizer: Hugging Face tokenizer to write instead of the run's own.
        with_tokenizer: write a tokenizer at all.
        verify: compare logits with ``transformers`` before the folder gets its name.
        max_shard_size: weights above this are spread over several files.
        origin: folder from which the model was imported; its config.json is kept where it still fits.
    """

    dtype: str = "auto"
    trim_vocab: bool = False
    tokenizer: str | None = None
    with_tokenizer: bool = True
    verify: bool = False
    max_shard_size: str = "5GB"
    origin: Path | None = None


def export_folder(
    config: Config, tensors: Mapping[str, Tensor], path: str | Path, *, options: ExportOptions | None = None
) -> dict[str, Any]:
    """Write a model as a folder for ``transformers``; it appears complete or not at all.

    Args:
        config: resolved configuration of the run.
        tensors: full canonical tensors.
        path: folder to make.
        options: see :class:`ExportOptions`.

    Returns:
        What was written: class, rows, dtype, bytes, whether with tokenizer, and ``verified`` (largest difference of
        logits, or None).

    Raises:
        ValueError: the classes cannot express the model, its tensors are not those of its configuration, the tokenizer
            cannot be written, ``path`` is taken, or the logits differ.
    """
    options = options or ExportOptions()
    check_expressible(config.model)
    family = attention_family(config)
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if config.run.bf16 else "float32")
    rows = kept_rows(config, tensors["word_embeddings.weight"].shape[0]) if options.trim_vocab else None
    kept = {name: tensor.to(DTYPES[dtype]) for name, tensor in (trim_rows(tensors, rows) if rows else tensors).items()}
    rows = kept["word_embeddings.weight"].shape[0]
    model = replace(config.model, padded_vocab_size=rows)
    specs = model_tensors(model, num_tensors=len(kept), source=str(path))
    check_tensors(kept, full_shapes(specs), source=f"the weights for {path} in {dtype}")
    weights = to_huggingface(kept, model)
    mask_id = config.objective.mask_token_id if family == "mdm" else None
    with replace_folder(path) as folder:
        has_tokenizer = options.with_tokenizer and write_tokenizer(
            config.data, folder, mask_id=mask_id, length=config.model.seq_length, source=options.tokenizer
        )
        if has_tokenizer:
            _check_ids(folder, config, rows, mask_id)
        eod = end_of_document(folder) if has_tokenizer else None
        if eod is None and has_tokenizer and options.tokenizer is None:  # copied byte for byte, without a word about it
            eod = build_tokenizer(config.data).eod_id
        if eod is None and config.data.tokenizer_type == "GPT2BPETokenizer" and config.data.vocab_size:
            eod = config.data.vocab_size - 1  # <|endoftext|> is the last token of GPT-2's vocabulary
        fields = huggingface_config(config, family=family, vocab_rows=rows, dtype=dtype, eod_id=eod)
        write_config(_with_origin(fields, options.origin), folder)
        if options.origin is not None and (options.origin / "generation_config.json").is_file():
            shutil.copyfile(options.origin / "generation_config.json", folder / "generation_config.json")
        size = write_weights(weights, folder, max_shard_size=options.max_shard_size)
        difference = compare_logits(config, kept, folder) if options.verify else None
    return {
        "class": CLASSES[family], "vocab_rows": rows, "dtype": dtype, "bytes": size, "tokenizer": has_tokenizer,
        "verified": difference,
    }  # fmt: skip


def _check_ids(folder: Path, config: Config, rows: int, mask_id: int | None) -> None:
    """Refuse a tokenizer with ids that the model was not trained on."""
    known = min(rows, max(config.data.vocab_size or rows, -1 if mask_id is None else mask_id + 1))
    size = tokenizer_size(folder) or 0
    if size > known:
        raise UserError(
            f"the tokenizer has {size:,} ids, and the model knows {known:,}",
            "every id was one of the training data, or is the mask",
            "pass --tokenizer with the one of the training data, or --no-tokenizer",
        )


def import_folder(path: str | Path, *, with_tokenizer: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """Read a folder of ``LlamaForCausalLM`` or ``EuroBertForMaskedLM``.

    Args:
        path: folder with config.json and safetensors.
        with_tokenizer: use its tokenizer.json as the tokenizer of the configuration.

    Returns:
        Resolved configuration and canonical tensors in fp32, an exact copy whatever the dtype of the file.

    Raises:
        ValueError: another class, a setting that our model lacks, damaged or pickled weights, a tensor missing or
        unknown.
    """
    folder = Path(path)
    config, _ = read_config(folder)
    rows = config.model.padded_vocab_size or 0
    weights = read_weights(folder)
    tied = not config.model.untie_embeddings_and_output_weights
    if tied and "lm_head.weight" in weights:  # some writers store the tied matrix twice
        if not torch.equal(weights["lm_head.weight"], weights.get("model.embed_tokens.weight", torch.empty(0))):
            raise UserError(
                f"{folder}: config.json ties the output to the embedding, the file holds another lm_head.weight",
                "they must be equal",
                'set "tie_word_embeddings" to false in config.json if the head is its own',
            )
        del weights["lm_head.weight"]
    shapes = huggingface_shapes(config.model, num_tensors=len(weights), source=str(folder))
    check_tensors(weights, shapes, source=str(folder))
    tensors = {name: tensor.float() for name, tensor in from_huggingface(weights, config.model).items()}
    used = tokenizer_size(folder) if with_tokenizer else None
    data = DataConfig(tokenizer_type="NullTokenizer", vocab_size=rows)
    if used is not None:
        if used > rows:
            raise UserError(
                f"{folder}: the tokenizer has {used} ids, the embedding {rows} rows",
                "every id needs a row",
                "remove the tokens that were added, or pass --no-tokenizer",
            )
        data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder), vocab_size=used)
    return replace(config, data=data), tensors


def verify_weights(config: Config, tensors: Mapping[str, Tensor]) -> float:
    """Compare our logits with those of ``transformers`` through an export that is thrown away; see compare_logits."""
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        options = ExportOptions(dtype="float32", with_tokenizer=False, verify=True)
        return export_folder(config, tensors, Path(scratch) / "export", options=options)["verified"]


def compare_logits(config: Config, tensors: Mapping[str, Tensor], folder: Path, *, sequences: int = 2) -> float:
    """Compare our logits with those of ``transformers``, in fp32 on random tokens.

    Args:
        config: resolved configuration.
        tensors: the canonical tensors that were exported, of any dtype.
        folder: the export.
        sequences: how many sequences of up to 64 tokens.

    Returns:
        Largest absolute difference.

    Raises:
        ValueError: it is above 1e-5 (relative to the largest logit where that is above 1) and above what rounding alone
            does, measured against fp64.
    """
    import transformers

    family = attention_family(config)
    rows = tensors["word_embeddings.weight"].shape[0]
    length = min(64, config.model.seq_length)
    ids = torch.randint(0, rows, (sequences, length), generator=torch.Generator().manual_seed(0))
    mask: AttentionMask = Full() if family == "mdm" else Causal()
    model = GPTModel(Shape.from_flags(config.model, padded_vocab_size=rows))
    load_tensors(model, tensors)
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    theirs = getattr(transformers, architecture).from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        ours = model.eval().logits(Inputs(ids), mask)
        difference = float((ours - theirs.eval()(input_ids=ids).logits).abs().max())
        limit = LOGIT_TOLERANCE * max(1.0, float(ours.abs().max()))
        if difference > limit:
            # Unusually large weights amplify rounding: then the measure is how far fp32 is from fp64 in our own model.
            limit = max(limit, 4 * float((ours - model.double().logits(Inputs(ids), mask)).abs().max()))
    if not difference <= limit:
        raise UserError(
            f"{folder}: the largest difference of logits is {difference:.3g}",
            f"transformers must agree within {limit:.3g}",
            "this is an error of the conversion or of that version of transformers: please report it",
        )
    return difference


def _with_origin(fields: dict[str, Any], origin: Path | None) -> dict[str, Any]:
    """Keep the config.json from which the model came, wherever its meaning is still the same."""
    if origin is None or not (origin / "config.json").is_file():
        return fields
    before = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    config, family = read_config(origin)
    meaning = huggingface_config(
        config,
        family=family,
        vocab_rows=config.model.padded_vocab_size or 0,
        dtype=fields["dtype"],
        eod_id=fields["eos_token_id"],
    )
    changed = {name: value for name, value in fields.items() if meaning.get(name) != value}
    dtype = before.get("dtype", before.get("torch_dtype"))
    if dtype is not None and dtype != fields["dtype"]:
        changed["dtype"] = fields["dtype"]
        before.pop("torch_dtype", None)  # its older name
    return {**before, **changed}
