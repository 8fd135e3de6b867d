"""What a run needs, from its flags alone: bytes of the fullest GPU by part, host memory, checkpoint, FLOPs, open files.

State is exact (``memory.py`` of each engine), activations are arithmetic (:mod:`megatron.model.memory`), what the
CUDA libraries take is assumed and named. No GPU, no process group, no data are needed; imported by tools only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from megatron.checkpoint.select import select
from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.config.validate import validate
from megatron.data.blend import parse_blend, read_data_path_file
from megatron.data.dataset import count_unique_tokens
from megatron.data.indexed import read_meta
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import UserError, require
from megatron.model.arithmetic import Device, positions_per_token
from megatron.model.gpt import build_layers
from megatron.model.mask import within_segments
from megatron.model.memory import block_working_set, head_bytes, kept_by_block, mask_bytes
from megatron.objectives import OBJECTIVES, Objective, build_objective, with_vocabulary
from megatron.objectives.base import flops_per_token
from megatron.parallel.tensor import ParameterFactory
from megatron.training.deepspeed.memory import Partition, held, optimizer_groups
from megatron.training.deepspeed.pipeline import stages
from megatron.training.deepspeed.settings import deepspeed_settings
from megatron.training.engine import compiles_blocks
from megatron.training.fsdp2 import memory as fsdp2_memory
from megatron.training.held import FLOAT, Held, Shapes
from megatron.training.plan import Layout
from megatron.training.resolve import layout_of, mask_row, shape_of
from megatron.training.schedule import plan_schedule

GPT2_VOCABULARY = 50257
# Assumed: CUDA context, NCCL, kernels and what the allocator loses; a process with its libraries; a loader process.
RUNTIME_BYTES, PROCESS_BYTES, WORKER_BYTES = 2_500_000_000, 3_000_000_000, 500_000_000


@dataclass(frozen=True)
class Case:
    """A run on machines that need not be there.

    Attributes:
        typed: the flags as given.
        flags: the same, with other settings of the layout where a layout is tried out.
        config: the same, with batch and vocabulary filled in.
        shape, layout, objective: its parts.
        tokens: length of training; None where only data tell it, which are not here.
        notes: what was assumed.
    """

    typed: Config
    flags: Config
    config: Config
    shape: Shape
    layout: Layout
    objective: Objective
    tokens: float | None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.run.bf16 else FLOAT

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled on a GPU, as the engine decides it."""
        return compiles_blocks(self.config.parallel, device="cuda")

    @property
    def is_split(self) -> bool:
        """Whether tensor-parallel ranks hold parts of the sequence, as the engine decides it."""
        return self.config.parallel.splits_sequence(self.shape.seq_length)

    @property
    def kept(self) -> float:
        """Bytes a position that a block keeps for its backward pass."""
        parts = kept_by_block(
            self.shape,
            tp_size=self.layout.tp_size,
            width=self.width,
            is_compiled=self.is_compiled,
            sequence_parallel=self.is_split,
        )
        return sum(parts.values())

    @property
    def flops_per_token(self) -> float:
        """Of the model, attention counted, recomputation not."""
        return flops_per_token(self.shape, self.objective)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU at one moment.

    Attributes:
        moment: when.
        stage: of the pipeline.
        parts: bytes by what they are for.
    """

    moment: str
    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())


def case_of(flags: Config, world_size: int, *, vocab_size: int | None = None) -> Case:
    """Fill in what a run would read from its data, where they are here, and assume the rest.

    Args:
        flags: from :func:`megatron.objectives.parse`, checked for so many processes.
        world_size: processes, one a GPU.
        vocab_size: tokens before padding, where it is known besides.

    Raises:
        UserError: data or tokenizer are here and cannot be used.
    """
    require(
        not flags.run.skip_train,
        "--skip-train",
        "preflight plans a training, and this is none",
        "plan without the flag",
    )
    require(
        flags.optimizer.optimizer != "muon",
        "--optimizer muon",
        "preflight counts the memory of AdamW, which keeps two moments of every weight",
        "plan without the flag; Muon keeps one of a matrix, and takes a step's 8 bytes a weight of the matrices besides",
    )
    notes: list[str] = []
    size = vocab_size or _vocabulary(flags, notes)
    manifest = _manifest(flags, notes)
    shape = shape_of(flags, size, manifest["config"]["model"] if manifest else {"padded_vocab_size": None})
    padded, layout = shape.padded_vocab_size, layout_of(flags, world_size)
    objective = with_vocabulary(flags.objective, mask_row(flags, size, padded, manifest), size=size, padded=padded)
    batch = layout.global_batch_size
    run = replace(flags.run, global_batch_size=batch)
    config = replace(flags, model=shape.recorded(), objective=objective, run=run)
    tokens = _tokens(flags, layout, notes)
    batched = replace(flags, run=run)  # a batch which no other layout changes
    return Case(flags, batched, config, shape, layout, build_objective(config), tokens, tuple(notes))


def changed(case: Case, **changes: int | bool | None) -> Case | None:
    """The same run with other settings of its layout, or None where they are refused.

    Args:
        case: the run; its global batch stays.
        changes: fields of ``parallel``, ``optimizer`` and ``run`` by name.
    """
    flags, config = _with(case.flags, changes), _with(case.config, changes)
    cls = OBJECTIVES[str(config.objective.objective)]
    options = cls.Options(**config.objective.options)
    try:
        validate(flags, options, needs_mask_token=cls.needs_mask_token, world_size=case.layout.world_size)
    except UserError:
        return None
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if case.shape.padded_vocab_size % tp:
        return None
    dp = case.layout.world_size // (tp * pp)
    layout = replace(
        case.layout,
        tp_size=tp,
        pp_size=pp,
        dp_size=dp,
        micro_batch_size=config.run.micro_batch_size,
        zero_stage=config.parallel.zero_stage,
    )
    return replace(case, flags=flags, config=config, layout=layout)


def _with(config: Config, changes: Mapping[str, int | bool | None]) -> Config:
    """The configuration with other values of some fields of these sections; its global batch stays."""
    for section in ("parallel", "optimizer", "run"):
        part: Any = getattr(config, section)
        known = {name: value for name, value in changes.items() if hasattr(part, name)}
        config = replace(config, **{section: replace(part, **known)})
    return config


def footprints(case: Case) -> list[Footprint]:
    """Every moment of every pipeline stage, fullest first."""
    found = [moment for stage in range(case.layout.pp_size) for moment in _moments(case, stage)]
    return sorted(found, key=lambda each: -each.total)


def fits(case: Case, device: Device) -> bool:
    """Whether the fullest GPU has room for it."""
    return footprints(case)[0].total <= device.memory_mib * 2**20


def held_by(case: Case, stage: int) -> Held:
    """What the engine of a stage holds, on the data-parallel rank that has most."""
    dp = case.layout.dp_size
    if case.layout.engine == "fsdp2":
        embedding, block, norm, head = _layer_parameters(case.shape, case.layout.tp_size)
        num_blocks = case.shape.num_layers
        return fsdp2_memory.held(case.config, block, embedding + norm + head, num_blocks=num_blocks, dp_size=dp)
    partition = Partition(optimizer_groups(_stage_parameters(case, stage)), dp)
    settings = deepspeed_settings(case.config, dp_size=dp, num_parameters=partition.elements)
    has_average = case.config.optimizer.ema_decay is not None
    return held(settings, partition, is_pipeline=case.layout.pp_size > 1, has_average=has_average)


def host_bytes(case: Case, gpus_per_node: int) -> dict[str, int]:
    """Host memory of one node, by moment: processes with their loaders, the largest tensor in fp32 where weights are drawn
    (whole, and this rank's part), masters and moments on their way to a checkpoint, and an optimizer that is kept there.

    Args:
        case: the run.
        gpus_per_node: processes of a node at most.
    """
    ranks = min(gpus_per_node, case.layout.world_size)
    sizes = [_elements(_stage_parameters(case, stage)) for stage in range(case.layout.pp_size)]
    largest = max(prod(shape) for part in _layer_parameters(case.shape, 1) for shape in part)
    drawing = case.layout.tp_size * case.layout.pp_size  # the first of the data-parallel ranks
    offloaded = max(held_by(case, stage).host for stage in range(case.layout.pp_size))
    is_there = offloaded and not case.config.run.async_save  # on the host in any case, and saved from there
    saved = 0 if is_there else _saved_bytes(case) * max(sizes) // case.layout.dp_size
    return {
        "processes": ranks * (PROCESS_BYTES + case.config.data.num_workers * WORKER_BYTES),
        "building": min(ranks, drawing) * 2 * FLOAT * largest,
        "saving": ranks * saved,
        "optimizer": ranks * offloaded,
    }


def checkpoint_bytes(case: Case) -> int:
    """Of one checkpoint."""
    return _saved_bytes(case) * num_parameters(case)


def _saved_bytes(case: Case) -> int:
    """Of a parameter in a checkpoint: fp32 master, two moments and, where it is kept, their average."""
    return FLOAT * (3 + (case.config.optimizer.ema_decay is not None))


def num_parameters(case: Case) -> int:
    """Of the whole model, padding rows included."""
    embedding, block, norm, head = _layer_parameters(case.shape, 1)
    return _elements(embedding + norm + head) + case.shape.num_layers * _elements(block)


def open_files(case: Case) -> int:
    """File descriptors of rank 0 at most: a socket to every rank for the host-side group and one for the rendezvous, NCCL's
    to its neighbours, and a loader's pipes (estimated)."""
    return 256 + 2 * case.layout.world_size + 16 * case.config.data.num_workers


def _vocabulary(flags: Config, notes: list[str]) -> int:
    data = flags.data
    if data.vocab_size is not None:
        return data.vocab_size
    places = [place for place in (data.vocab_file, data.merge_file, data.tokenizer_model) if place]
    is_named = places or data.tokenizer_type not in (None, "NullTokenizer")  # one of bytes has no file
    if is_named and all(Path(place).exists() for place in places):
        return build_tokenizer(data).vocab_size
    prefixes = _prefixes(flags)
    sizes = {(read_meta(prefix) or {}).get("vocab_size") for prefix in prefixes} if prefixes else set()
    if len(sizes) == 1 and (size := sizes.pop()):
        return int(size)
    if flags.model.padded_vocab_size is None:
        notes.append(f"neither tokenizer nor data are here: a vocabulary of {GPT2_VOCABULARY:,} is assumed")
    return flags.model.padded_vocab_size or GPT2_VOCABULARY


def _prefixes(flags: Config) -> list[str]:
    """Prefixes of the training data, where all of them are here."""
    data = flags.data
    words = list(data.train_data_path)
    if data.train_data_path_file is not None and Path(data.train_data_path_file).is_file():
        words = read_data_path_file(data.train_data_path_file)
    prefixes = [prefix for _, prefix in parse_blend(words)] if words else []
    return prefixes if all(Path(f"{prefix}.idx").is_file() for prefix in prefixes) else []


def _manifest(flags: Config, notes: list[str]) -> dict[str, Any]:
    """Of the checkpoint from which the run starts, where it is here; else empty."""
    run = flags.run
    if run.load is None or Path(run.load).exists():
        return {} if run.load is None else select(run.load, run.load_tag, checksums=False).manifest
    if run.load != run.save:
        notes.append(f"--load {run.load} is not here: a checkpoint of this shape and vocabulary is assumed")
    return {}


def _tokens(flags: Config, layout: Layout, notes: list[str]) -> float | None:
    run, prefixes = flags.run, _prefixes(flags)
    if run.train_epochs is not None and not prefixes:
        notes.append("the data are not here: --train-epochs tells no length, pass --train-samples")
        return None
    unique = 0 if run.train_epochs is None else count_unique_tokens(prefixes)
    if run.branch_from is None:  # lengths that no run can have; those of a branch depend on the one that it leaves
        plan_schedule(flags, layout, unique_tokens=unique, before={}, branch=None)
    samples = run.train_samples or (run.train_iters or 0) * layout.global_batch_size
    return float(samples * flags.model.seq_length) if run.train_epochs is None else run.train_epochs * unique


@lru_cache(maxsize=256)
def _layer_parameters(shape: Shape, tp_size: int) -> tuple[Shapes, Shapes, Shapes, Shapes]:
    """Shapes of a rank's parameters in the embedding, one block, the last norm and the head, by building
    them without memory; a head that is tied has none."""
    layers = build_layers(shape, ParameterFactory.of_shapes(tp_size))
    parts = [layers[0], layers[1], layers[-2], *([] if layers[-1].tied_to else [layers[-1]])]
    sizes = [tuple(tuple(p.shape) for p in part.build().parameters()) for part in parts]
    embedding, block, norm, head = [*sizes, ()][:4]
    return embedding, block, norm, head


def _stage_parameters(case: Case, stage: int) -> Shapes:
    """Those of one rank of a stage, in the order of the module; both ends of a pipeline hold a tied embedding."""
    embedding, block, norm, head = _layer_parameters(case.shape, case.layout.tp_size)
    pp = case.layout.pp_size
    own = block * stages(case.shape, case.objective, case.config.parallel)[stage]
    if stage == 0:
        own = embedding + own
    if stage == pp - 1:
        own += norm + (head or (embedding if pp > 1 else ()))
    return own


def _elements(shapes: Shapes) -> int:
    return sum(map(prod, shapes))


def _moments(case: Case, stage: int) -> list[Footprint]:
    """The moments at which a stage may be fullest."""
    state = held_by(case, stage)
    building = {"weights": case.width * _elements(_stage_parameters(case, stage))}
    passes = _activations(case, stage)
    steps: list[tuple[str, dict[str, int]]] = [
        ("building", building),
        ("forward pass done", state.forward | passes[0]),
        ("backward pass done", state.backward | passes[1]),
        ("update", state.update),
    ]
    always = {"rotary": _rotary_bytes(case.shape), "runtime": RUNTIME_BYTES}
    return [Footprint(moment, stage, parts | always) for moment, parts in steps]


def _rotary_bytes(shape: Shape) -> int:
    """Of the fp32 tables of cos and sin, which all blocks share."""
    return 2 * (shape.seq_length + 1) * shape.kv_channels * FLOAT * shape.use_rotary_position_embeddings


def _activations(case: Case, stage: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes when the forward pass of the last micro-batch is done, and when its backward pass reaches the first block."""
    shape, layout, width = case.shape, case.layout, case.width
    mask = case.objective.attention_mask
    if case.config.data.reset_attention_mask:
        mask = within_segments(mask)
    length = shape.seq_length * positions_per_token(mask)
    samples = layout.micro_batch_size * case.objective.num_views
    rows = samples * length
    kept = case.kept
    boundary = width * shape.hidden_size / (layout.tp_size if case.is_split else 1)
    blocks = stages(shape, case.objective, case.config.parallel)[stage]
    in_flight = min(layout.pp_size - stage, layout.num_micro_batches)
    is_recomputed = case.config.parallel.recompute_activations
    # A stage hands one tensor on and keeps it; the last one has the input and the output of the norm.
    stored = in_flight * (blocks * (boundary if is_recomputed else kept) + boundary)
    masks = mask_bytes(mask, shape, samples=samples, positions=length, width=width)
    working = block_working_set(shape, tp_size=layout.tp_size, width=width)
    one = kept + working
    head = 0
    if stage == layout.pp_size - 1:
        head = head_bytes(shape, rows=rows, tp_size=layout.tp_size, width=width)
    rest = (in_flight - 1) * blocks * (boundary if is_recomputed else kept)
    # With recomputation a block is whole again while its gradients are made.
    full = max(head, rows * one) if is_recomputed else head
    forward = {"activations": round(rows * stored + masks + (full - head)), "head": head}
    backward = {"activations": round(rows * (rest + one) + masks), "head": 0}
    return forward, backward
