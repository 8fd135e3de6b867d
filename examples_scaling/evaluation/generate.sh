#!/usr/bin/env bash
# Text of a checkpoint: 0.59 h and $1.8 a billion tokens through the model on 1 H100 (estimated, not measured).
# Masked diffusion is shown while it is uncovered. Further flags: tools/generate.py --help.
#   CHECKPOINT=runs/mdm_140m_100M bash examples_scaling/evaluation/generate.sh --infix "and that was all." --steps 16
: "${RUN_NAME:=mdm_best_on_100m}" "${PROMPT:=The capital of France is}" "${NEW_TOKENS:=32}" "${GPUS_PER_NODE:=1}"
: "${EVAL_TOKENIZER_FLAGS:=--tokenizer-type HFTokenizer --tokenizer-model gpt2}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read -r -a tokenizer <<<"$EVAL_TOKENIZER_FLAGS"
launch tools/generate.py --load "${CHECKPOINT:-$RUN_DIR}" ${LOAD_TAG:+--load-tag "$LOAD_TAG"} "${tokenizer[@]}" --prompt "$PROMPT" \
  --max-new-tokens "$NEW_TOKENS" "$@"
