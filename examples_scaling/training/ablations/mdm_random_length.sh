#!/usr/bin/env bash
# Masked diffusion with sequences of random length: 0.76 h and $18 on 8 H100 (estimated, not measured).
# A share RANDOM_LENGTH_RATIO of them is cut (1 % in LLaDA). Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RANDOM_LENGTH_RATIO:=0.01}" "${RUN_NAME:=mdm_random_length}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --random-length-ratio "$RANDOM_LENGTH_RATIO" "$@"
