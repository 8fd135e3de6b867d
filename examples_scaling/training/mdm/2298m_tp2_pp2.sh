#!/usr/bin/env bash
# 2298M masked-diffusion model: 1.1 h and $27 a billion tokens on 8 H100 (estimated, not measured).
# One node of 8 GPUs: tensor parallel 2, pipeline 2, data parallel 2, activations recomputed.
# One epoch over a large set: TRAIN_DATA=/path/prefix VALID_DATA=/path/prefix bash examples_scaling/training/mdm/2298m_tp2_pp2.sh
: "${MODEL:=2298M}" "${TP_SIZE:=2}" "${PP_SIZE:=2}" "${MICRO_BATCH_SIZE:=4}" "${RUN_NAME:=mdm_2298m_tp2_pp2}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --recompute-activations "$@"
