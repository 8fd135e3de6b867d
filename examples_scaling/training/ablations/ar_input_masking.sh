#!/usr/bin/env bash
# Causal model with masked inputs: 0.76 h and $18 on 8 H100 (estimated, not measured).
# Each sequence masks a share of them drawn from U(0, INPUT_MASK_RATIO). Everything else is as in ../ar/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${INPUT_MASK_RATIO:=0.5}" "${RUN_NAME:=ar_input_masking_${INPUT_MASK_RATIO}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train ar --input-mask-ratio "$INPUT_MASK_RATIO" "$@"
