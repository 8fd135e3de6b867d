#!/usr/bin/env bash
# Masked diffusion, partly from left to right: 0.76 h and $18 on 8 H100 (estimated, not measured).
# A share AR_RATIO of the sequences masks its last tokens instead of random ones. Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${AR_RATIO:=0.5}" "${RUN_NAME:=mdm_left_to_right_${AR_RATIO}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --ar-ratio "$AR_RATIO" "$@"
