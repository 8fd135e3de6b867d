#!/usr/bin/env bash
# Block diffusion, between AR and masked diffusion: 1.5 h and $37 on 8 H100 (estimated, not measured).
# BLOCK_SIZE=1 is AR, BLOCK_SIZE = sequence length masked diffusion. A noised and a clean copy pass through
# the model. Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${BLOCK_SIZE:=16}" "${RUN_NAME:=mdm_block_diffusion_${BLOCK_SIZE}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --objective block_diffusion --block-size "$BLOCK_SIZE" "$@"
