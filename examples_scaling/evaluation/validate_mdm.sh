#!/usr/bin/env bash
# Likelihood bound of a whole validation set: 0.2 h and $4.9 a billion tokens on 8 H100 (estimated, not measured).
# With its standard error; NUM_MC noise draws a sample, the same samples and the same noise for every checkpoint.
# CHECKPOINT: run directory; the result goes to its evaluations/. MODEL: its size. VALID_DATA, TOKENIZER_FLAGS, SEQ_LENGTH: see common.sh.
: "${MODEL:=140M}" "${RUN_NAME:=mdm_140m_100M}" "${NUM_MC:=8}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
evaluate mdm "$@"
