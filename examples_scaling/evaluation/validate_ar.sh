#!/usr/bin/env bash
# Exact likelihood of a whole validation set: 0.025 h and $0.61 a billion tokens on 8 H100 (estimated, not measured).
# CHECKPOINT: run directory; the result goes to its evaluations/. MODEL: its size. VALID_DATA, TOKENIZER_FLAGS, SEQ_LENGTH: see common.sh.
: "${MODEL:=140M}" "${RUN_NAME:=ar_140m_100M}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
evaluate ar "$@"
