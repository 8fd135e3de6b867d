#!/usr/bin/env bash
# Masked diffusion with the uniform weights of MaskGIT: 0.76 h and $18 on 8 H100 (estimated, not measured).
# The training loss is no likelihood bound; validation is. Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RUN_NAME:=mdm_maskgit}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --objective maskgit "$@"
