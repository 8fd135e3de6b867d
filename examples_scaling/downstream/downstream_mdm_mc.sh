#!/usr/bin/env bash
# Downstream tasks, Monte-Carlo bound of masked diffusion: 0.073 h and $1.8 a billion tokens through the model on 8 H100 (estimated, not measured).
# Up to NUM_MC draws an answer, fewer where the ranking is decided.
# CHECKPOINT: a run directory (any layout) or a Hugging Face export. TASKS: names, lm-eval tasks or .jsonl files.
: "${RUN_NAME:=mdm_best_on_100m}" "${NUM_MC:=128}"
: "${TASKS:=arc_easy,boolq,copa,hellaswag,piqa,race,winogrande,sciq}" "${RESULTS:=results/$(basename "$0" .sh).json}" "${EVAL_BATCH:=32}"
# The quickstart data came tokenised, so the run names no tokenizer: this is GPT-2's, from the hub or its cache.
: "${EVAL_TOKENIZER_FLAGS:=--tokenizer-type HFTokenizer --tokenizer-model gpt2}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read -r -a tokenizer <<<"$EVAL_TOKENIZER_FLAGS"
launch tools/evaluate_downstream.py --load "${CHECKPOINT:-$RUN_DIR}" --load-tag "${LOAD_TAG:-latest}" "${tokenizer[@]}" \
  --task_list "$TASKS" --results_path "$RESULTS" --micro-batch-size "$EVAL_BATCH" --inference \
  --eval_method mc --only_mc_nll --num-mc "$NUM_MC" --eval_fp32 "$@"
