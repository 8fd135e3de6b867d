#!/usr/bin/env bash
# Causal model with augmented samples: 0.76 h and $18 on 8 H100 (estimated, not measured).
# Random tokens, right to left, targets further ahead. Everything else is as in ../ar/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RUN_NAME:=ar_augmented}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train ar --objective augmented_ar "$@"
