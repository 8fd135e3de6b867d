"""A launch script of Megatron-DeepSpeed, from its flags to a run: the model and the data are those that it meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.data.indexed import IndexedDataset
from megatron.data.prepare.writer import IndexedDatasetWriter

HIDDEN, LAYERS, SEQ, VOCABULARY, FFN = 64, 2, 32, 512, 256
SCRIPT = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 4 --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --micro-batch-size 4 --global-batch-size 8 --train-iters 6 --lr 1e-3 --min-lr 1e-5 "
    "--lr-decay-style cosine --weight-decay 0.1 --eval-interval 3 --eval-iters 2 --log-interval 1 --save-interval 6 "
    "--tokenizer-type NullTokenizer --vocab-size 500 --fp16 --loss-scale 0 --initial-loss-scale 65536 --hysteresis 2 "
    "--distributed-backend nccl --lr-decay-iters 6 --lr-warmup-iters 2 --position-embedding-type learned_absolute "
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-gradient-accumulation-fusion --use-distributed-optimizer "
    "--num-workers 0 --transformer-impl local --sequence-parallel --recompute-granularity full --recompute-method uniform "
    "--dataloader-type single --attention-softmax-in-fp32 --DDP-impl local"
)


def megatron_parameters() -> int:
    """Embedding, positions, blocks of two LayerNorms, QKV, projection and two feed-forward matrices, all with biases; a norm."""
    attention = 3 * HIDDEN * HIDDEN + 3 * HIDDEN + HIDDEN * HIDDEN + HIDDEN
    block = 2 * 2 * HIDDEN + attention + HIDDEN * FFN + FFN + FFN * HIDDEN + HIDDEN
    positions = SEQ + 1  # the one thing more than there: a row behind the context
    return (VOCABULARY + positions) * HIDDEN + LAYERS * block + 2 * HIDDEN


def documents_alone(source: Path, target: Path, begin: int, end: int) -> None:
    data = IndexedDataset(source)
    with IndexedDatasetWriter(target, np.dtype(np.uint16)) as writer:
        for index in range(begin, end):
            writer.add_document(np.asarray(data[index]))


def test_a_foreign_script_trains_megatrons_model_on_the_parts_of_its_split(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """300 documents, split 90,8,2: the run is that on files which hold documents 0 to 269 and 270 to 293."""
    whole = token_files / "train"
    words = f"{SCRIPT} --megatron-defaults --save {tmp_path / 'split'} --data-path {whole} --split 90,8,2".split()
    assert pools(1).run(jobs.train, "ar", words)[0].status == 0
    said = pools(1).output(0)
    assert "--fp16 as --bf16 (runs as bf16" in said and "defaults of Megatron taken:" in said
    assert f"{megatron_parameters():,} parameters" in said
    assert "--sequence-parallel (needs another --tensor-model-parallel-size than 1)" in said

    documents_alone(whole, tmp_path / "train", 0, 270)
    documents_alone(whole, tmp_path / "valid", 270, 294)
    paths = f"--train-data-path {tmp_path / 'train'} --valid-data-path {tmp_path / 'valid'}"
    words = f"{SCRIPT} --megatron-defaults --save {tmp_path / 'apart'} {paths}".split()
    assert pools(1).run(jobs.train, "ar", words)[0].status == 0
    for kind, value in (("train", "loss"), ("valid", "nll")):
        split, apart = (jobs.records(tmp_path / name, kind) for name in ("split", "apart"))
        assert [split[step][value] for step in split] == [apart[step][value] for step in apart] != []

    record = json.loads((tmp_path / "split/run.json").read_text())
    assert [part["part"] for parts in record["data"].values() for part in parts] == [[0, 270], [270, 294]]
