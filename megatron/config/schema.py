"""The whole configuration of a run: six frozen dataclasses, one field per command-line flag.

``cli.py`` generates the flags, their groups, defaults and help text from these fields, ``validate.py`` checks the
rules between them, and ``run.json`` stores them. Nothing changes a configuration after :func:`megatron.config.parse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from megatron.config.option import ABOVE_ZERO, DROPOUT, EPSILON, MINUTES, NOT_NEGATIVE, POSITIVE, SEED

from megatron.config.option import SIZE, TOKENS, Range, option  # isort: skip

# How a validation draws masks, recorded with a run: one without a record has the second. The names are
# those of the same estimators of a request (megatron/evaluation/estimators.py).
EXACT_COUNT, BERNOULLI = "exact-count-antithetic", "bernoulli"
# Scheme of the training noise, recorded with a run: a run keeps the one that it began with. A run without a record has 1.
#   1: stratified times in the order of the samples.
#   2: stratified times in antithetic pairs and radical-inverse order, so that every micro-batch covers the range of t.
NOISE_SCHEME = 2
# Kinds of tensors in a checkpoint that are weights: as trained, and their exponential moving average.
WEIGHT, AVERAGE = "weight", "ema"
# What several flags need.
LOAD, SAVE, WANDB, WHOLE_MODEL = ("load",), ("save",), ("wandb_project",), ("pipeline_model_parallel_size=1",)
VALIDATION, TRACKERS = ("valid_data_path", "valid_data_path_file"), ("tensorboard_dir", "wandb_project")
RATES = ("cosine", "linear", "constant", "inverse-square-root", "WSD")  # as Megatron spells them
DECAY, WSD, MUON = ("lr_decay_style!=constant",), ("lr_decay_style=WSD",), ("optimizer=muon",)
GPT2_BPE = ("tokenizer_type=GPT2BPETokenizer", "tokenizer_type=none")
MODEL_FILE = ("tokenizer_type=HFTokenizer", "tokenizer_type=SentencePieceTokenizer", "tokenizer_type=none")
# What earlier versions had no choice of.
UNRECORDED: dict[str, dict[str, Any]] = {
    "run": {"valid_estimator": BERNOULLI},
    "objective": {"loss_weighting": "elbo"},
    "optimizer": {"ema_decay": None},
}


@dataclass(frozen=True)
class ModelConfig:
    """Transformer shape. Defaults are the architecture of arXiv 2507.15857 (pre-norm RMSNorm, RoPE, SwiGLU, no biases)."""

    # fmt: off
    model: str | None = option(None, "size preset such as 7M, 140M or 2298M; sets layers, width, heads and kv channels",
        unit="NAME", affects="output")
    num_layers: int | None = option(None, "transformer blocks", unit="LAYERS", range=SIZE)
    hidden_size: int | None = option(None, "width of the residual stream", unit="CHANNELS", range=SIZE)
    num_attention_heads: int | None = option(None, "query heads", unit="HEADS", range=SIZE)
    num_query_groups: int | None = option(None,
        "key/value heads (grouped-query attention); default: as many as query heads",
        flags=("--num-query-groups", "--num-key-value-heads"), unit="HEADS", range=SIZE)
    kv_channels: int | None = option(None, "channels per head; default: hidden size / heads", unit="CHANNELS",
        range=SIZE)
    ffn_hidden_size: int | None = option(None, "feed-forward width; default: floor(8h/3/64)*64 with SwiGLU, else 4h",
        unit="CHANNELS", range=SIZE)
    seq_length: int = option(2048, "tokens per sample", unit="TOKENS", range=TOKENS)
    max_position_embeddings: int | None = option(None,
        "rows of the learned position table, not below the sequence length; default: equal to it", unit="TOKENS",
        range=TOKENS, needs=("use_rotary_position_embeddings=false",), published=True)
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary to a multiple of this, whatever the layout",
        unit="TOKENS", range=SIZE, needs=("padded_vocab_size=none",))
    padded_vocab_size: int | None = option(None,
        "rows of the embedding matrix; default: those of a loaded checkpoint, else the vocabulary, padded",
        unit="TOKENS", range=TOKENS)
    normalization: str = option("rmsnorm", "normalisation layer", choices=("rmsnorm", "layernorm"))
    layernorm_epsilon: float = option(1e-5, "epsilon of the normalisation layers", range=EPSILON)
    swiglu: bool = option(True, "SwiGLU feed-forward, else GELU")
    use_rotary_position_embeddings: bool = option(True, "rotary position embeddings, else a learned position table")
    rotary_base: float = option(10000.0, "base of the rotary frequencies", range=Range(above=1, at_most=1e12),
        needs=("use_rotary_position_embeddings=true",))
    disable_bias_linear: bool = option(True, "no biases in linear layers")
    untie_embeddings_and_output_weights: bool = option(False, "give the output head its own matrix")
    attention_dropout: float = option(0.1, "dropout of attention probabilities", unit="P", range=DROPOUT)
    hidden_dropout: float = option(0.1, "dropout of embeddings and block outputs", unit="P", range=DROPOUT)
    attention_backend: str = option("sdpa",
        "kernels of attention: those that PyTorch chooses, or through its switch FlashAttention 3 or 4 (GPU, bf16)",
        choices=("sdpa", "fa3", "fa4"), needs=("bf16",), affects="layout")
    swiglu_backend: str = option("torch", "SwiGLU kernel: PyTorch, or the liger-kernel package (CUDA)",
        choices=("torch", "liger"), needs=("swiglu=true",), affects="layout")
    init_method_std: float = option(0.02,
        "standard deviation of initial weights; block outputs are further scaled by 1/sqrt(2*layers)",
        range=Range(above=0, at_most=100))
    # fmt: on


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what. The program (pretrain_gpt.py, pretrain_mdm.py) sets the default objective; its further
    flags stand beside it, in the ``Options`` of its class, and come back in ``options`` by name."""

    # fmt: off
    objective: str | None = option(None, "training objective, one of the above; default: the program's own", unit="NAME")
    mask_token_id: int | None = option(None, "id of the mask token; default: the first padding row", unit="ID",
        range=Range(at_least=0, at_most=10**9))
    # fmt: on
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. Paths are Megatron prefixes: PREFIX.bin and PREFIX.idx."""

    AFFECTS: ClassVar[str] = "identity"

    # fmt: off
    train_data_path: list[str] = option([], "training prefix, or a blend: WEIGHT PREFIX [WEIGHT PREFIX ...]",
        unit="PATH")
    valid_data_path: list[str] = option([], "validation prefix or blend", unit="PATH")
    train_data_path_file: str | None = option(None,
        'file holding one line: "WEIGHT PREFIX" for training, several quoted pairs blend', unit="FILE")
    valid_data_path_file: str | None = option(None, "the same for validation", unit="FILE")
    allow_training_data_in_validation: bool = option(False, "validate on training data", affects="layout",
        needs=VALIDATION)
    data_impl: str = option("mmap", "on-disk format of the tokens", choices=("mmap", "infer"),
        no_effect="tokens are always memory-mapped", affects="output")
    data_cache_path: str | None = option(None,
        "folder of cached index maps; default: index-cache/ beside the data, or a temporary folder", unit="DIR",
        affects="output")
    verify_data: bool = option(False,
        "read all data once at the start and compare them with the digests that PREFIX.meta.json records")
    reset_position_ids: bool = option(False, "restart the positions with every document of a sample",
        affects="results")
    reset_attention_mask: bool = option(False, "keep attention within the documents of a sample",
        affects="results")
    eod_mask_loss: bool = option(False, "leave end-of-document tokens out of the loss as inputs",
        affects="results")
    num_workers: int = option(2, "data loader processes per rank; 0 prepares batches in the training process",
        unit="PROCESSES", range=Range(at_least=0, at_most=1024), affects="layout")
    tokenizer_type: str | None = option(None, "tokenizer family; default: GPT2BPETokenizer with --vocab-file, "
        "HFTokenizer with --tokenizer-model, else the tokenizer that the training data names",
        choices=("GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer", "NullTokenizer"))
    vocab_file: str | None = option(None, "vocab.json of a GPT-2 BPE", unit="FILE", needs=GPT2_BPE)
    merge_file: str | None = option(None, "merges.txt of a GPT-2 BPE", unit="FILE", needs=GPT2_BPE)
    tokenizer_model: str | None = option(None,
        "Hugging Face tokenizer (hub name, folder or tokenizer.json) or SentencePiece .model", unit="PATH", needs=MODEL_FILE)
    vocab_size: int | None = option(None,
        "vocabulary before padding; needed only with NullTokenizer (pre-tokenised data)", unit="TOKENS", range=TOKENS,
        affects="results")
    # fmt: on


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Schedules count samples, so that they do not depend on the layout."""

    # fmt: off
    optimizer: str = option("adam", "adam: torch AdamW (fused); fusedadam: apex, where installed; muon: Muon for the "
        "matrices of the blocks, AdamW for embeddings, head, norms and biases", choices=("adam", "fusedadam", "muon"))
    lr: float = option(2e-4, "peak learning rate", range=Range(above=0, at_most=1000))
    min_lr: float = option(0.0, "final learning rate", range=Range(at_least=0, at_most=1000), needs=DECAY,
        affects="schedule")
    lr_decay_style: str = option("cosine", "shape of the decay; WSD: constant until the end (warm-up, stable, decay)",
        choices=RATES, affects="schedule")
    lr_decay_samples: int | None = option(None, "samples over which the rate decays; default: all training samples",
        unit="SAMPLES", range=POSITIVE, needs=(*DECAY, "lr_warmup_fraction"), affects="length")
    lr_wsd_decay_samples: int | None = option(None,
        "samples over which WSD decays, up to those of --lr-decay-samples; default, of a branch alone: all that it trains",
        unit="SAMPLES", range=NOT_NEGATIVE, needs=WSD, affects="length")
    lr_wsd_decay_style: str = option("exponential", "shape of the decay of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"), needs=WSD, affects="schedule")
    lr_warmup_samples: float = option(0, "samples of linear warm-up", unit="SAMPLES", range=NOT_NEGATIVE,
        affects="length")
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of the decay samples", unit="FRACTION",
        range=DROPOUT, affects="length")
    weight_decay: float = option(0.01, "decoupled weight decay of matrices; one-dimensional tensors have none",
        range=Range(at_least=0, at_most=1000))
    adam_beta1: float = option(0.9, "first-moment decay", range=DROPOUT)
    adam_beta2: float = option(0.999, "second-moment decay", range=DROPOUT)
    adam_eps: float = option(1e-8, "denominator epsilon", range=EPSILON)
    muon_momentum: float = option(0.95, "momentum of Muon", range=DROPOUT, needs=MUON)
    muon_nesterov: bool = option(True, "Nesterov momentum of Muon", needs=MUON)
    muon_num_ns_steps: int = option(5, "Newton-Schulz iterations of Muon", unit="STEPS", range=Range(at_least=1, at_most=99),
        needs=MUON)
    muon_scale_mode: str = option("spectral", "factor of an update of Muon, of A rows and B columns: sqrt(max(A, B)) or "
        "sqrt(max(1, A/B))", choices=("spectral", "shape_scaling"), needs=MUON)
    muon_extra_scale_factor: float = option(0.2, "further factor; 0.2 with spectral gives updates the size of AdamW's",
        range=Range(above=0, at_most=1000), needs=MUON)
    clip_grad: float = option(1.0, "global gradient-norm limit; 0 disables", range=Range(at_least=0, at_most=1e9))
    ema_decay: float | None = option(None, "also keep an exponential moving average of the weights, and validate it; update n of "
        "it decays by min(this, (1 + n) / (10 + n))", unit="DECAY", range=Range(above=0, below=1))
    cpu_optimizer: bool = option(False, "keep optimizer state in host memory (no pipeline)", needs=WHOLE_MODEL,
        affects="layout")
    max_skipped_steps: int = option(10,
        "steps in a row with a NaN or infinite loss or gradient that are skipped; one more ends the run", unit="STEPS",
        range=NOT_NEGATIVE, affects="output")
    # fmt: on


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over processes: tensor x pipeline x data = world size."""

    AFFECTS: ClassVar[str] = "layout"

    # fmt: off
    engine: str = option("deepspeed", "what shares model and optimizer out over data-parallel ranks: DeepSpeed, or torch's "
        "fully_shard (no pipeline)", choices=("deepspeed", "fsdp2"))
    tensor_model_parallel_size: int = option(1, "tensor-parallel ranks",
        flags=("--tensor-model-parallel-size", "--tp-size"), unit="RANKS", range=SIZE)
    pipeline_model_parallel_size: int = option(1, "pipeline stages",
        flags=("--pipeline-model-parallel-size", "--pp-size"), unit="STAGES", range=SIZE)
    no_pipeline_parallel: bool = option(False,
        "refuse pipeline stages (scripts of Megatron-DeepSpeed pass it for ZeRO 2/3)", needs=WHOLE_MODEL)
    zero_stage: int = option(1, "ZeRO stage, 0 to 3; 0 runs as 1, which gives the same numbers in less memory; with --engine "
        "fsdp2 3 gathers the weights of a block for each pass, and what is less runs as 2, which keeps them between the passes",
        unit="STAGE", range=Range(at_least=0, at_most=3))
    deepspeed: bool = option(False, "for existing scripts: DeepSpeed is the engine unless --engine names another",
        no_effect="--engine chooses the engine")
    deepspeed_config: str | None = option(None,
        "JSON of further DeepSpeed settings; one that contradicts a flag is refused", unit="FILE",
        flags=("--deepspeed_config", "--deepspeed-config"), needs=("engine=deepspeed",))
    recompute_activations: bool = option(False, "activation checkpointing: recompute each block in the backward pass",
        flags=("--recompute-activations", "--checkpoint-activations"))
    sequence_parallel: bool | None = option(None, "tensor-parallel ranks share the sequence between their products, which saves "
        "activations in training; default: on where --seq-length is divisible by their number",
        needs=("tensor_model_parallel_size!=1",), published=True)
    compile: bool | None = option(None, "torch.compile each block; default: on with CUDA, but for ZeRO 3 of DeepSpeed (its hooks "
        "break graphs)")
    distributed_timeout_minutes: float = option(30.0, "give up on a collective after this long", unit="MINUTES",
        range=Range(at_least=0.1, at_most=30_000))  # poll(2) waits 24 days at most
    # fmt: on

    def splits_sequence(self, seq_length: int) -> bool:
        """Whether sequence parallelism is on: as the flag says, else where it can be."""
        is_possible = self.tensor_model_parallel_size > 1 and seq_length % self.tensor_model_parallel_size == 0
        return is_possible and self.sequence_parallel is not False


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, precision, logging, validation and checkpoints."""

    AFFECTS: ClassVar[str] = "output"

    # fmt: off
    micro_batch_size: int = option(1, "samples per forward pass and data-parallel rank", unit="SAMPLES", range=SIZE,
        affects="layout")
    global_batch_size: int | None = option(None,
        "samples per step over all ranks; default: micro batch x data-parallel size", unit="SAMPLES", range=TOKENS,
        affects="length")
    train_samples: int | None = option(None, "length of training", unit="SAMPLES", range=POSITIVE, affects="length")
    train_iters: int | None = option(None, "length of training, instead of --train-samples", unit="ITERS",
        range=POSITIVE, affects="length")
    train_epochs: float | None = option(None, "length of training, instead of --train-samples", unit="EPOCHS",
        range=ABOVE_ZERO, affects="length")
    seed: int = option(1234, "seed of weights, data order, dropout and mask noise", range=SEED, affects="results")
    noise_scheme: int | None = option(None,
        "version of the noise, to repeat an older run; default: the newest, or that of the checkpoint", unit="VERSION",
        range=Range(at_least=1, at_most=NOISE_SCHEME))
    bf16: bool = option(False, "bfloat16 weights with an fp32 master copy; default: fp32", affects="results")
    save: str | None = option(None,
        "run directory: run.json, metrics.jsonl and checkpoints; default: runs/..., no checkpoints", unit="DIR")
    load: str | None = option(None, "run directory or checkpoint to continue from; the folder of --save, if empty, starts fresh",
        unit="DIR")
    load_tag: str | None = option(None,
        "checkpoint to load, such as global_step100, latest or best; default: newest valid one", unit="TAG", needs=LOAD)
    branch_from: str | None = option(None,
        "leave another run at one of its checkpoints and go on here, its data order kept: to decay the rate of a stable run; "
        "the same command continues the branch", unit="RUN:TAG", needs=SAVE)
    load_kind: str | None = option(None, "weights to load: as trained, or their average (--ema-decay); default: weight, and with "
        "--load-tag best those that were validated as the best", choices=(WEIGHT, AVERAGE), needs=("finetune", "skip_train"))
    save_interval: int | None = option(None, "steps between checkpoints; the last step is always saved", unit="ITERS",
        range=POSITIVE, needs=SAVE)
    async_save: bool = option(False, "copy what a checkpoint holds to host memory, and write it while training goes on",
        needs=SAVE, published=True)
    keep_last: int | None = option(None, "checkpoints to keep besides the best one; default: all", unit="COUNT",
        range=POSITIVE, needs=SAVE)
    save_best: bool = option(False, "save also when a validation is the best so far; --load-tag best loads it",
        needs=SAVE)
    overwrite: bool = option(False,
        "replace the run that is in the folder of --save; without it such a folder is refused", needs=SAVE)
    change_settings: bool = option(False, "continue although settings that change results differ from the run's own; "
        "run.json records the step from which they hold", needs=("load", "branch_from"))
    finetune: bool = option(False, "load weights only: start at step 0 with a fresh optimizer", needs=LOAD)
    no_load_optim: bool = option(False, "do not load optimizer state", needs=LOAD, published=True)
    no_load_rng: bool = option(False,
        "draw fresh dropout and mask noise after loading instead of continuing the stream", needs=LOAD, published=True)
    log_interval: int = option(10, "steps between progress lines", unit="ITERS", range=POSITIVE)
    eval_interval: int | None = option(None, "steps between validations; default: only at the end", unit="ITERS",
        range=POSITIVE, needs=VALIDATION, affects="validation")
    eval_iters: str = option("10", "validation steps of one global batch each, or 'full' for the whole set",
        unit="ITERS|full", needs=VALIDATION, published=True, affects="validation")
    num_mc: int = option(1, "noise draws per validation sample (objectives whose loss is a bound)", unit="DRAWS",
        range=SIZE, needs=VALIDATION, published=True, affects="validation")
    valid_estimator: str | None = option(None, "masks of a validation whose loss is a bound: complementary pairs of exact "
        "counts, or a coin a token as in training; default: that of a run that goes on, else the first",
        choices=(EXACT_COUNT, BERNOULLI), needs=VALIDATION, affects="validation")
    gap_task: str | None = option(None,
        "JSONL of {query, choices, gold}: log the likelihood gap of right to wrong answers with every validation",
        unit="FILE", needs=VALIDATION, affects="validation")
    skip_train: bool = option(False, "validate only")
    exit_duration_in_mins: float | None = option(None, "save and exit this long after the start of the program",
        unit="MINUTES", range=MINUTES)
    exit_interval: int | None = option(None, "save and exit after a step that is a multiple of this", unit="ITERS",
        range=POSITIVE)
    kill_switch_file: str | None = option(None, "save and exit when this file appears", unit="FILE")
    tensorboard_dir: str | None = option(None, "write TensorBoard events here", unit="DIR")
    tensorboard_queue_size: int = option(10, "events buffered before a write", unit="EVENTS", range=SIZE,
        needs=("tensorboard_dir",), published=True)
    log_timers_to_tensorboard: bool = option(False, "also write step seconds to TensorBoard and W&B",
        needs=TRACKERS, published=True)
    log_batch_size_to_tensorboard: bool = option(False, "also write the global batch size to TensorBoard and W&B",
        needs=TRACKERS, published=True)
    log_validation_ppl_to_tensorboard: bool = option(False, "also write validation perplexity to TensorBoard and W&B",
        needs=TRACKERS, published=True)
    wandb_project: str | None = option(None, "log to this Weights & Biases project (offline without a login)",
        unit="NAME")
    wandb_entity: str | None = option(None, "user or team of the W&B project", unit="NAME", needs=WANDB, published=True)
    wandb_exp_name: str | None = option(None, "name of the W&B run", unit="NAME", needs=WANDB, published=True)
    wandb_group: str | None = option(None, "group of the W&B run", unit="NAME", needs=WANDB, published=True)
    wandb_save_dir: str | None = option(None, "folder of local W&B files", unit="DIR", needs=WANDB, published=True)
    # fmt: on


@dataclass(frozen=True)
class Config:
    """The flags of one run by section. None leaves open what data, tokenizer or checkpoint tell (``training/resolve.py``)."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"title": "model"})
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig, metadata={"title": "objective"})
    data: DataConfig = field(default_factory=DataConfig, metadata={"title": "data and tokenizer"})
    optimizer: OptimizerConfig = field(
        default_factory=OptimizerConfig, metadata={"title": "optimizer and learning rate"}
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata={"title": "parallelism and engine"})
    run: RunConfig = field(
        default_factory=RunConfig, metadata={"title": "run: length, logging, validation, checkpoints"}
    )


# What only training reads: beside --skip-train it is named at start, because scripts and files pass it to both.
OF_TRAINING = {
    *(item.name for item in fields(OptimizerConfig) if item.name != "cpu_optimizer"),
    *("attention_dropout", "hidden_dropout", "recompute_activations"),
    *("train_samples", "train_iters", "train_epochs", "log_interval", "eval_interval", "exit_interval"),
    *("save_interval", "async_save", "keep_last", "save_best", "overwrite", "change_settings"),
    *("no_load_optim", "no_load_rng", "tensorboard_dir", "wandb_project"),
}
SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in fields(Config)}


@cache
def affects(section: str, name: str) -> str:
    """What another value of a setting means, by the words of :func:`~megatron.config.option.option`; options of an objective,
    and what this version does not know, change results."""
    cls = SECTIONS.get(section)
    item = getattr(cls, "__dataclass_fields__", {}).get(name)
    return (item and item.metadata and (item.metadata["affects"] or getattr(cls, "AFFECTS", ""))) or "results"
