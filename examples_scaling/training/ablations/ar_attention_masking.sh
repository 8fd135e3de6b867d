#!/usr/bin/env bash
# Causal model with random attention masking: 0.76 h and $18 on 8 H100 (estimated, not measured).
# A query drops earlier keys with probability RANDMASK_RATIO. Everything else is as in ../ar/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RANDMASK_RATIO:=0.5}" "${RUN_NAME:=ar_attention_masking_${RANDMASK_RATIO}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train ar --randmask-ratio "$RANDMASK_RATIO" "$@"
