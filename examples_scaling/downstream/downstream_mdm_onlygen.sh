#!/usr/bin/env bash
# Downstream tasks, masked diffusion, generation only: 0.073 h and $1.8 a billion tokens through the model on 8 H100 (estimated, not measured).
# Is the last word what greedy confidence decoding gives?
# CHECKPOINT: a run directory (any layout) or a Hugging Face export. TASKS: names, lm-eval tasks or .jsonl files.
: "${RUN_NAME:=mdm_best_on_100m}"
: "${TASKS:=lambada}" "${RESULTS:=results/$(basename "$0" .sh).json}" "${EVAL_BATCH:=32}"
# The quickstart data came tokenised, so the run names no tokenizer: this is GPT-2's, from the hub or its cache.
: "${EVAL_TOKENIZER_FLAGS:=--tokenizer-type HFTokenizer --tokenizer-model gpt2}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read -r -a tokenizer <<<"$EVAL_TOKENIZER_FLAGS"
launch tools/evaluate_downstream.py --load "${CHECKPOINT:-$RUN_DIR}" --load-tag "${LOAD_TAG:-latest}" "${tokenizer[@]}" \
  --task_list "$TASKS" --results_path "$RESULTS" --micro-batch-size "$EVAL_BATCH" --inference \
  --eval_method mc --only_generate --eval_fp32 "$@"
