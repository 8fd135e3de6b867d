"""The whole configuration of a run: six frozen dataclasses, one field per command-line flag.

``cli.py`` generates the flags, their groups, defaults and help text from these fields, ``validate.py`` checks the
rules between them, and ``run.json`` stores them. Nothing changes a configuration after :func:`megatron.config.parse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config.option import option


@dataclass(frozen=True)
class ModelConfig:
    """Transformer shape. Defaults are the architecture of arXiv 2507.15857 (pre-norm RMSNorm, RoPE, SwiGLU, no biases)."""

    model: str | None = option(
        None, "size preset such as 7M, 140M or 2298M; sets layers, width, heads and kv channels", unit="NAME"
    )
    num_layers: int | None = option(None, "transformer blocks", unit="LAYERS")
    hidden_size: int | None = option(None, "width of the residual stream", unit="CHANNELS")
    num_attention_heads: int | None = option(None, "query heads", unit="HEADS")
    num_query_groups: int | None = option(
        None,
        "key/value heads (grouped-query attention); default: as many as query heads",
        flags=("--num-query-groups", "--num-key-value-heads"),
        unit="HEADS",
    )
    kv_channels: int | None = option(None, "channels per head; default: hidden size / heads", unit="CHANNELS")
    ffn_hidden_size: int | None = option(
        None, "feed-forward width; default: floor(8h/3/64)*64 with SwiGLU, else 4h", unit="CHANNELS"
    )
    seq_length: int = option(2048, "tokens per sample", unit="TOKENS")
    max_position_embeddings: int | None = option(
        None, "rows of the learned position table, at least the sequence length (default: equal)", unit="TOKENS"
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this times the tensor-parallel size", unit="TOKENS"
    )
    padded_vocab_size: int | None = option(
        None,
        "rows of the embedding matrix; default: the vocabulary, padded (a loaded checkpoint's own size wins)",
        unit="TOKENS",
    )
    normalization: str = option("rmsnorm", "normalisation layer", choices=("rmsnorm", "layernorm"))
    layernorm_epsilon: float = option(1e-5, "epsilon of the normalisation layers")
    swiglu: bool = option(True, "SwiGLU feed-forward; --no-swiglu gives GELU")
    use_rotary_position_embeddings: bool = option(
        True, "rotary position embeddings; the --no- form gives a learned position table"
    )
    rotary_base: float = option(10000.0, "base of the rotary frequencies")
    disable_bias_linear: bool = option(True, "no biases in linear layers; the --no- form adds them")
    untie_embeddings_and_output_weights: bool = option(False, "give the output head its own matrix")
    attention_dropout: float = option(0.1, "dropout of attention probabilities", unit="P")
    hidden_dropout: float = option(0.1, "dropout of embeddings and block outputs", unit="P")
    attention_backend: str = option(
        "sdpa",
        "attention kernels: PyTorch's scaled_dot_product_attention, or the flash-attn package (CUDA, bf16)",
        choices=("sdpa", "flash-attn"),
    )
    swiglu_backend: str = option(
        "torch", "SwiGLU kernel: PyTorch, or the liger-kernel package (CUDA)", choices=("torch", "liger")
    )
    init_method_std: float = option(
        0.02, "standard deviation of initial weights; block outputs are further scaled by 1/sqrt(2*layers)"
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what. The program (pretrain_gpt.py, pretrain_mdm.py) sets the default objective."""

    objective: str | None = option(None, "training objective; default: the program's own", unit="NAME")
    mask_token_id: int | None = option(
        None, "id of the mask token; default: the first padding row after the vocabulary", unit="ID"
    )
    independent_t: bool = option(
        False, "draw the diffusion time of every sample independently instead of stratified over the global batch"
    )
    ar_ratio: float = option(
        0.0, "MDM: probability that a sequence masks its last tokens instead of random ones", unit="P"
    )
    low_noise_start: bool = option(False, "MDM: scale the diffusion time down in the first iterations")
    low_noise_iter: int = option(0, "MDM: iterations with scaled time", unit="ITERS")
    low_noise_ratio: float = option(1.0, "MDM: factor on the time in those iterations, in (0, 1]", unit="RATIO")
    num_order_list: int | None = option(
        None, "AR over permuted orders: number of token orders, the first left-to-right", unit="ORDERS"
    )
    use_order_list: bool = option(False, "AR over permuted orders; needs --num-order-list")
    use_predefined_order: bool = option(False, "order i sorts position + i*N(0,1) instead of a uniform permutation")
    randmask_ratio: float = option(
        0.0, "AR with random attention masking: probability that a query drops earlier keys", unit="P"
    )
    input_mask_ratio: float = option(
        0.0, "AR with masked inputs: each sequence masks a share of them drawn from U(0, this)", unit="RATIO"
    )
    noise_schedule: str | None = option(
        None,
        "masked share as a function of t: linear t, cosine sin(pi*t/2), polynomial t^power; default: linear (maskgit: "
        "cosine)",
        choices=("linear", "cosine", "polynomial"),
    )
    noise_schedule_power: float | None = option(None, "power of the polynomial schedule; default: 2", unit="POWER")
    random_length_ratio: float = option(
        0.0, "MDM: probability that a sequence is cut in two at a uniformly random length", unit="P"
    )
    block_size: int | None = option(None, "block diffusion: tokens per block", unit="TOKENS")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. Paths are Megatron prefixes: PREFIX.bin and PREFIX.idx."""

    train_data_path: list[str] = option(
        [], "training prefix, or a blend: WEIGHT PREFIX [WEIGHT PREFIX ...]", unit="PATH"
    )
    valid_data_path: list[str] = option([], "validation prefix or blend", unit="PATH")
    train_data_path_file: str | None = option(
        None, 'file holding one line: "WEIGHT PREFIX" for training, several quoted pairs blend', unit="FILE"
    )
    valid_data_path_file: str | None = option(None, "the same for validation", unit="FILE")
    data_impl: str = option("mmap", "on-disk format of the tokens", choices=("mmap", "infer"))
    data_cache_path: str | None = option(
        None, "folder of cached index maps; default: index-cache/ beside the data, or a temporary folder", unit="DIR"
    )
    num_workers: int = option(
        2, "data loader processes per rank; 0 prepares batches in the training process", unit="PROCESSES"
    )
    tokenizer_type: str | None = option(
        None,
        "tokenizer family; default: GPT2BPETokenizer with --vocab-file, HFTokenizer with --tokenizer-model, "
        "else the tokenizer that the training data names",
        choices=("GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer", "NullTokenizer"),
    )
    vocab_file: str | None = option(None, "vocab.json of a GPT-2 BPE", unit="FILE")
    merge_file: str | None = option(None, "merges.txt of a GPT-2 BPE", unit="FILE")
    tokenizer_model: str | None = option(
        None, "Hugging Face tokenizer (hub name, folder or tokenizer.json) or SentencePiece .model", unit="PATH"
    )
    vocab_size: int | None = option(
        None, "vocabulary before padding; needed only with NullTokenizer (pre-tokenised data)", unit="TOKENS"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Schedules count samples, so that they do not depend on the layout."""

    optimizer: str = option(
        "adam", "adam: torch AdamW (fused); fusedadam: apex, where installed", choices=("adam", "fusedadam")
    )
    lr: float = option(2e-4, "peak learning rate")
    min_lr: float = option(0.0, "final learning rate")
    lr_decay_style: str = option("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    lr_decay_samples: int | None = option(
        None, "samples over which the rate decays; default: all training samples", unit="SAMPLES"
    )
    lr_warmup_samples: int = option(0, "samples of linear warm-up", unit="SAMPLES")
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of the decay samples", unit="FRACTION")
    weight_decay: float = option(0.01, "decoupled weight decay of matrices; one-dimensional tensors have none")
    adam_beta1: float = option(0.9, "first-moment decay")
    adam_beta2: float = option(0.999, "second-moment decay")
    adam_eps: float = option(1e-8, "denominator epsilon")
    clip_grad: float = option(1.0, "global gradient-norm limit; 0 disables")
    cpu_optimizer: bool = option(False, "keep optimizer state in host memory (no pipeline)", flags=("--cpu-optimizer",))
    max_skipped_steps: int = option(
        10, "stop after this many consecutive steps with a NaN or infinite loss or gradient", unit="STEPS"
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over processes: tensor x pipeline x data = world size."""

    tensor_model_parallel_size: int = option(
        1, "tensor-parallel ranks", flags=("--tensor-model-parallel-size", "--tp-size"), unit="RANKS"
    )
    pipeline_model_parallel_size: int = option(
        1, "pipeline stages", flags=("--pipeline-model-parallel-size", "--pp-size"), unit="STAGES"
    )
    no_pipeline_parallel: bool = option(
        False, "refuse pipeline stages (scripts of Megatron-DeepSpeed pass it for ZeRO 2/3)"
    )
    zero_stage: int = option(
        1, "ZeRO stage, 0 to 3; 0 runs as 1, which gives the same numbers in less memory", unit="STAGE"
    )
    deepspeed: bool = option(False, "accepted for existing scripts: DeepSpeed is always the engine")
    deepspeed_config: str | None = option(
        None,
        "JSON of further DeepSpeed settings; one that contradicts a flag is refused",
        unit="FILE",
        flags=("--deepspeed_config", "--deepspeed-config"),
    )
    recompute_activations: bool = option(
        False,
        "activation checkpointing: recompute each block in the backward pass",
        flags=("--recompute-activations", "--checkpoint-activations"),
    )
    compile: bool | None = option(None, "torch.compile each block; default: on with CUDA, off on CPU")
    distributed_timeout_minutes: float = option(30.0, "give up on a collective after this long", unit="MINUTES")


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, precision, logging, validation and checkpoints."""

    micro_batch_size: int = option(1, "samples per forward pass and data-parallel rank", unit="SAMPLES")
    global_batch_size: int | None = option(
        None, "samples per step over all ranks; default: micro batch x data-parallel size", unit="SAMPLES"
    )
    train_samples: int | None = option(None, "length of training", unit="SAMPLES")
    train_iters: int | None = option(None, "length of training, instead of --train-samples", unit="ITERS")
    train_epochs: float | None = option(None, "length of training, instead of --train-samples", unit="EPOCHS")
    seed: int = option(1234, "seed of weights, data order, dropout and mask noise")
    bf16: bool = option(False, "bfloat16 weights with an fp32 master copy; default: fp32")
    save: str | None = option(
        None, "run directory: run.json, metrics.jsonl and checkpoints; default: runs/..., no checkpoints", unit="DIR"
    )
    load: str | None = option(
        None, "run directory or checkpoint to continue from; an empty one starts fresh", unit="DIR"
    )
    load_tag: str | None = option(
        None, "checkpoint to load, such as global_step100 or latest; default: newest valid one", unit="TAG"
    )
    save_interval: int | None = option(None, "steps between checkpoints; the last step is always saved", unit="ITERS")
    keep_last: int | None = option(None, "checkpoints to keep besides the best one; default: all", unit="COUNT")
    finetune: bool = option(False, "load weights only: start at step 0 with a fresh optimizer")
    no_load_optim: bool = option(False, "do not load optimizer state", flags=("--no-load-optim",))
    no_load_rng: bool = option(
        False,
        "draw fresh dropout and mask noise after loading instead of continuing the stream",
        flags=("--no-load-rng",),
    )
    log_interval: int = option(10, "steps between progress lines", unit="ITERS")
    eval_interval: int | None = option(None, "steps between validations; default: only at the end", unit="ITERS")
    eval_iters: str = option(
        "10", "validation steps of one global batch each, or 'full' for the whole set", unit="ITERS|full"
    )
    num_mc: int = option(
        1, "noise draws per validation sample (objectives whose loss is a bound)", flags=("--num-mc",), unit="DRAWS"
    )
    gap_task: str | None = option(
        None,
        "JSONL of {query, choices, gold}: log the likelihood gap of right to wrong answers with every validation",
        unit="FILE",
    )
    skip_train: bool = option(False, "validate only")
    exit_duration_in_mins: float | None = option(None, "save and exit after this long", unit="MINUTES")
    kill_switch_file: str | None = option(None, "save and exit when this file appears", unit="FILE")
    tensorboard_dir: str | None = option(None, "write TensorBoard events here", unit="DIR")
    tensorboard_queue_size: int = option(10, "events buffered before a write", unit="EVENTS")
    log_timers_to_tensorboard: bool = option(False, "also write step seconds to TensorBoard")
    log_batch_size_to_tensorboard: bool = option(False, "also write the global batch size to TensorBoard")
    log_validation_ppl_to_tensorboard: bool = option(False, "also write validation perplexity to TensorBoard")
    wandb_project: str | None = option(
        None, "log to this Weights & Biases project (offline without a login)", unit="NAME"
    )
    wandb_exp_name: str | None = option(None, "name of the W&B run", unit="NAME")
    wandb_group: str | None = option(None, "group of the W&B run", unit="NAME")
    wandb_save_dir: str | None = option(None, "folder of local W&B files", unit="DIR")


@dataclass(frozen=True)
class Config:
    """One run, resolved: every derived number (``None`` defaults) is filled in by :func:`megatron.config.parse`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
