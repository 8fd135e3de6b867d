#!/usr/bin/env bash
# Masked diffusion with an exact number of masks: 0.76 h and $18 on 8 H100 (estimated, not measured).
# m ~ U{1 .. sequence length} tokens are masked. Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RUN_NAME:=mdm_exact_count}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --objective exact_count_mdm "$@"
