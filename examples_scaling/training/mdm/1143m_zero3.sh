#!/usr/bin/env bash
# 1143M masked-diffusion model: 0.57 h and $14 a billion tokens on 8 H100 (estimated, not measured).
# Weights, gradients and optimizer state are sharded over the data-parallel ranks (ZeRO 3), one node.
# TRAIN_DATA=/path/prefix VALID_DATA=/path/prefix bash examples_scaling/training/mdm/1143m_zero3.sh
: "${MODEL:=1143M}" "${ZERO_STAGE:=3}" "${MICRO_BATCH_SIZE:=4}" "${RUN_NAME:=mdm_1143m_zero3}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --no-pipeline-parallel "$@"
