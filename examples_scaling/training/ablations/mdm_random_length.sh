#!/usr/bin/env bash
# Masked diffusion with a share RANDOM_LENGTH_RATIO of the sequences cut at a random length (1 % in LLaDA).
# Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RANDOM_LENGTH_RATIO:=0.01}" "${RUN_NAME:=mdm_random_length}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --random-length-ratio "$RANDOM_LENGTH_RATIO" "$@"
