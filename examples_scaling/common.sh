# shellcheck shell=bash
# Sourced by every example script: defaults, the flags of a run, and the launcher.
#
# Its settings are environment variables (--help lists them); further arguments of a script go to the program unchanged and win:
#   MODEL=7M EPOCHS=2 bash examples_scaling/training/ar/140m_100M.sh --log-interval 1
#   bash examples_scaling/training/ar/140m_100M.sh --dry-run       check the flags, print the command, run nothing
#   GPUS_PER_NODE=8 NNODES=2 bash examples_scaling/training/ar/140m_100M.sh --dry-run     what would run there
# Running a script again continues its run from the newest checkpoint in RUN_DIR. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save a
# checkpoint and end the script with status 75 ("run it again"; 0 is the real end), as does: touch RUN_DIR.stop
# Ctrl-C twice ends it at once with status 130.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

die() { echo "$(basename "$0"): error: $1; $2; $3" >&2; exit 2; }   # what was given, the rule, the fix
# Of NAME..., those that the caller set: refuse BESIDE RULE FIX NAME... does so, idle WHY NAME... says that they were set in vain.
is_given() { [[ -n "${!1:-}" && "$(declare -p "$1")" == "declare -x"* ]]; }
refuse() { local name; for name in "${@:4}"; do ! is_given "$name" || die "$name=${!name} $1" "$2" "$3"; done; }
idle() {
  local name names=""
  for name in "${@:2}"; do ! is_given "$name" || names="$names${names:+, }$name"; done
  [ -z "$names" ] || echo "without effect here: $names ($1)" >&2
}
head_of() { sed -n '/^# shellcheck/d; /^#SBATCH/d; /^#!/d; /^#/!q; s/^# \{0,1\}//p' "$1"; }
variables_of() {   # the variables that FILE... give a value, each once; what is computed or empty stands alone
  echo "Variables:"; grep -ohE '\$\{[A-Z0-9_]+:?=[^}]*' "$@" | sed -E 's/^..([A-Z0-9_]+):?=/\1=/; s/=(.*[$].*)?$//; s/=(.* .*)/="\1"/' \
    | awk -F= '!seen[$1]++' | paste -sd ' ' - | fold -sw 100 | sed 's/^/  /'
}
DRY_RUN=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -h|--help) head_of "$0"; echo; head_of "${BASH_SOURCE[0]}"; variables_of "$0" "${BASH_SOURCE[0]}"; exit 0 ;;
  esac
done
gpu_count() { if command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi; }

# Data: the quickstart set (100M training tokens of C4, GPT-2 BPE). A prefix is a path without .bin/.idx.
: "${DATA_DIR:=$REPO/data}"   # where ./download.sh puts it
: "${TRAIN_DATA:=$DATA_DIR/c4_100m/gpt2tok_c4_100_text_document}"
: "${VALID_DATA:=$DATA_DIR/c4_100m/gpt2tok_c4_val_text_document}"
# TOKENIZER_MODEL or TOKENIZER_FLAGS: how ids were made; default: GPT-2 BPE from $DATA_DIR/gpt2, or without these files the size of its vocabulary.
# Length and batch. EPOCHS counts passes over the training data; TRAIN_SAMPLES, where set, takes its place.
: "${EPOCHS:=1}" "${TRAIN_SAMPLES:=}" "${SEQ_LENGTH:=2048}" "${MICRO_BATCH_SIZE:=8}" "${GLOBAL_BATCH_SIZE:=256}"
# Optimiser: the recipe of arXiv 2507.15857, but for its dropout of 0.1, which quickstart/ takes.
: "${LR:=2e-4}" "${MIN_LR:=2e-5}" "${WARMUP_FRACTION:=0.01}" "${WEIGHT_DECAY:=0.1}" "${SEED:=1234}"
: "${ADAM_BETA1:=0.9}" "${ADAM_BETA2:=0.95}" "${CLIP_GRAD:=1.0}" "${DROPOUT:=0.0}"
# Memory in pieces that grow: sequences of varying shapes (validation, samples) do not split it up. Both names are torch's.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Layout: processes per node (default: its GPUs), nodes, and how one model is split over them. BF16=0 is fp32, which a machine
# without GPU takes; where this one has none, a dry run for GPUS_PER_NODE or NNODES is meant for another.
GPUS="$(gpu_count)" HAS_GPUS="${HOSTFILE:-}"
[ "$GPUS" = 0 ] || HAS_GPUS=1
[ "$DRY_RUN" = 0 ] || HAS_GPUS="$HAS_GPUS${GPUS_PER_NODE:-}${NNODES:-}"
: "${HOSTFILE:=}" "${BF16:=${HAS_GPUS:+1}}" "${GPUS_PER_NODE:=$((GPUS > 0 ? GPUS : 1))}" "${NNODES:=1}" "${NODE_RANK:=0}"
: "${MASTER_ADDR:=localhost}" "${MASTER_PORT:=$((20000 + ${SLURM_JOB_ID:-9500} % 10000))}" "${LAUNCHER:=auto}"
: "${TP_SIZE:=1}" "${PP_SIZE:=1}" "${ZERO_STAGE:=1}"
# Validation, logging and checkpoints. NUM_MC: noise draws per validation sample (masked diffusion only).
: "${EVAL_INTERVAL:=500}" "${EVAL_ITERS:=10}" "${NUM_MC:=1}" "${LOG_INTERVAL:=10}" "${SAVE_INTERVAL:=500}" "${KEEP_LAST:=2}"
: "${RUN_NAME:=$(basename "$0" .sh)}" "${RUN_DIR:=$REPO/runs/$RUN_NAME}"
: "${EXIT_DURATION_IN_MINS:=}" "${TENSORBOARD_DIR:=}" "${WANDB_PROJECT:=}"

# RANK_LOGS: a folder for the output of every process (torchrun), and for what NCCL did last where it hung. In a SLURM job:
: "${RANK_LOGS:=${SLURM_JOB_ID:+$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}}}"
# What a training alone reads, and what it shares with an evaluation of its objective.
OF_TRAINING=(TRAIN_DATA EPOCHS TRAIN_SAMPLES LR MIN_LR WARMUP_FRACTION WEIGHT_DECAY ADAM_BETA1 ADAM_BETA2 CLIP_GRAD DROPOUT
  EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL SAVE_INTERVAL KEEP_LAST TENSORBOARD_DIR WANDB_PROJECT)
SHARED=(VALID_DATA TOKENIZER_MODEL TOKENIZER_FLAGS SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE SEED TP_SIZE PP_SIZE
  ZERO_STAGE BF16)
# shellcheck source=cluster.sh
source "$REPO/examples_scaling/cluster.sh"

find_python() {
  CHECKS_FLAGS="$DRY_RUN"   # a dry run needs no environment: without one it shows where it would be, and checks nothing
  if [ "$DRY_RUN" = 1 ]; then
    ENV_PYTHON="$(bash "$REPO/install.sh" --print-python 2>/dev/null)" || { ENV_PYTHON="$REPO/.venv/bin/python"; CHECKS_FLAGS=0; }
  else ENV_PYTHON="$(bash "$REPO/install.sh" --print-python)" || exit 1; fi
  BIN="$(dirname "$ENV_PYTHON")"
}

# supervise COMMAND...: runs it (with --dry-run prints it) and returns its status. A stop reaches it once, whoever sends it
# and whatever launcher stands between: launchers know few signals, kill after 30 s, or leave their processes behind. So
# training is asked by its kill-switch file, which all nodes see; everything else gets SIGTERM (or ASK), as a whole process group.
supervise() {
  local status=0 child="" name
  if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@"; echo; return; fi
  STOPS="" INTERRUPTED=0 EARLY=0
  # shellcheck disable=SC2064  # of each its own name
  for name in TERM USR1 HUP INT; do trap "pass_on $name \"\$child\"" "$name"; done   # before the command, which may signal at once
  set -m   # a process group of its own: Ctrl-C in a terminal comes through here
  "$@" & child=$!
  set +m
  [ "$EARLY" = 0 ] || hand_on "$child"
  until INTERRUPTED=0; status=0; wait "$child" || status=$?; [ "$INTERRUPTED" = 0 ]; do :; done
  trap - TERM USR1 HUP INT
  [ -z "$STOPS" ] || [ -z "${STOP_FILE:-}" ] || rm -f "$STOP_FILE"
  case "$STOPS" in *INT*INT*) exit 130 ;; esac
  if [ -n "$STOPS" ] && [ "$status" = 0 ]; then status=75; fi   # what would follow is not started
  if [ "$status" = 75 ]; then echo "stopped; the same command continues"; fi
  return "$status"
}

# pass_on SIGNAL CHILD: the trap of supervise. CHILD is empty until there is one.
pass_on() {
  INTERRUPTED=1 STOPS="$STOPS $1"
  if [ -n "$2" ]; then hand_on "$2"; else EARLY=1; fi
}

# hand_on CHILD: what a stop does to it.
hand_on() {
  case "$STOPS" in *INT*INT*) kill -KILL -- "-$1" || true; return ;; esac   # Ctrl-C twice; a checkpoint is whole or absent
  if [ -n "${STOP_FILE:-}" ]; then mkdir -p "$(dirname "$STOP_FILE")"; touch "$STOP_FILE"
  else kill -s "${ASK:-TERM}" -- "-$1" || true; fi
}

# launch PROGRAM FLAGS...: runs one program of the repository.
launch() {
  local program="$1" argument previous="" flags=() STOP_FILE=""; shift
  for argument in "$@"; do
    [ "$previous" != --kill-switch-file ] || STOP_FILE="$argument"
    case "$argument" in --kill-switch-file=*) STOP_FILE="${argument#*=}" ;; esac
    [ "$argument" = --dry-run ] || flags+=("$argument")
    previous="$argument"
  done
  case "$program" in tools/*) idle "$program takes the checkpoint's, or has flags for it" "${OF_TRAINING[@]}" "${SHARED[@]}" ;; esac
  find_python
  choose_launcher
  if [ "$LAUNCHER" != deepspeed ] || [ "$DRY_RUN" = 1 ]; then
    supervise "${LAUNCH[@]}" "$REPO/$program" "${flags[@]}" || return
    case "$CHECKS_FLAGS $program" in
      "1 pretrain_"*) "$ENV_PYTHON" "$REPO/tools/_target.py" "$program" "$WORLD" "${flags[@]}" ;;
    esac
    return
  fi
  local words status=0   # DeepSpeed goes on talking after an error: ours comes last
  words="$(mktemp -d)"
  MEGATRON_LAST_WORDS="$words/words" supervise "${LAUNCH[@]}" "$REPO/$program" "${flags[@]}" || status=$?
  [ ! -f "$words/words" ] || cat "$words/words" >&2
  rm -rf "$words"
  return "$status"
}

# tool NAME FLAGS...: runs tools/NAME. once FILE NAME FLAGS...: unless FILE, its output, is there; tools write whole files.
tool() {
  local name="$1"; shift
  [ -n "${ENV_PYTHON:-}" ] || find_python
  supervise "$ENV_PYTHON" "$REPO/tools/$name" "$@"
}
once() { if [ ! -e "$1" ]; then tool "${@:2}"; fi; }

program_of() {
  case "$1" in
    ar) echo pretrain_gpt.py ;;
    mdm) echo pretrain_mdm.py ;;
    *) die "objective $1" "the example scripts know ar and mdm" "run pretrain_gpt.py --objective $1 directly" ;;
  esac
}

# Fills FLAGS with what training and evaluation share: data, model shape, batch and layout. MODEL is a preset name.
shared_flags() {
  local tokenizer=(--tokenizer-type NullTokenizer --vocab-size 50257) gpt2="$DATA_DIR/gpt2"
  case "$BF16" in ""|0|1) ;; *) die "BF16=$BF16" "it is 1 for bf16, 0 or empty for fp32" "mend or unset it" ;; esac
  [ -z "${TOKENIZER_MODEL:-}" ] || [ -z "${TOKENIZER_FLAGS:-}" ] || die "TOKENIZER_MODEL and TOKENIZER_FLAGS" \
    "the tokenizer is named once" "unset one of them"
  if [ -n "${TOKENIZER_MODEL:-}" ]; then tokenizer=(--tokenizer-model "$TOKENIZER_MODEL")
  elif [ -n "${TOKENIZER_FLAGS+set}" ]; then read -r -a tokenizer <<<"$TOKENIZER_FLAGS"
  elif [ -f "$gpt2/merges.txt" ]; then tokenizer=(--vocab-file "$gpt2/vocab.json" --merge-file "$gpt2/merges.txt"); fi
  FLAGS=(${MODEL:+--model "$MODEL"} --seq-length "$SEQ_LENGTH" --valid-data-path "$VALID_DATA" ${tokenizer[@]+"${tokenizer[@]}"}
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --seed "$SEED"
    --tensor-model-parallel-size "$TP_SIZE" --pipeline-model-parallel-size "$PP_SIZE" --zero-stage "$ZERO_STAGE")
  if [ "$BF16" = 1 ]; then FLAGS+=(--bf16); fi
}

# train OBJECTIVE FLAGS...
train() {
  local program; program="$(program_of "$1")"; shift
  shared_flags
  idle "only an evaluation reads it" CHECKPOINT LOAD_TAG
  [ -z "$TRAIN_SAMPLES" ] || idle "TRAIN_SAMPLES takes its place" EPOCHS
  FLAGS+=(--train-data-path "$TRAIN_DATA" --attention-dropout "$DROPOUT" --hidden-dropout "$DROPOUT"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction "$WARMUP_FRACTION" --clip-grad "$CLIP_GRAD"
    --weight-decay "$WEIGHT_DECAY" --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2"
    --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --num-mc "$NUM_MC" --log-interval "$LOG_INTERVAL"
    --save "$RUN_DIR" --load "$RUN_DIR" --kill-switch-file "$RUN_DIR.stop" --save-interval "$SAVE_INTERVAL" --keep-last "$KEEP_LAST"
    ${EXIT_DURATION_IN_MINS:+--exit-duration-in-mins "$EXIT_DURATION_IN_MINS"}
    ${TENSORBOARD_DIR:+--tensorboard-dir "$TENSORBOARD_DIR"}
    ${WANDB_PROJECT:+--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$RUN_NAME"})
  if [ -n "$TRAIN_SAMPLES" ]; then FLAGS+=(--train-samples "$TRAIN_SAMPLES"); else FLAGS+=(--train-epochs "$EPOCHS"); fi
  [ "$DRY_RUN" = 1 ] || rm -f "$RUN_DIR.stop"   # of a stop that came while no step was made
  launch "$program" "${FLAGS[@]}" "$@"
}

# evaluate OBJECTIVE FLAGS...: the whole validation set, from the checkpoint in CHECKPOINT (default: this run's).
evaluate() {
  local program; program="$(program_of "$1")"; shift
  shared_flags
  idle "only a training reads it" "${OF_TRAINING[@]}"
  launch "$program" "${FLAGS[@]}" --load "${CHECKPOINT:-$RUN_DIR}" ${LOAD_TAG:+--load-tag "$LOAD_TAG"} \
    --skip-train --eval-iters full --num-mc "$NUM_MC" ${EXIT_DURATION_IN_MINS:+--exit-duration-in-mins "$EXIT_DURATION_IN_MINS"} "$@"
}
