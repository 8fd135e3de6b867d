#!/usr/bin/env bash
# 140M causal model, 100 epochs over 100M tokens of C4: 0.76 h and $18 on 8 H100 (estimated, not measured).
# Matched pair: ../mdm/140m_100M.sh differs only in the objective (same model, data, batch, learning rate; no dropout).
: "${MODEL:=140M}" "${EPOCHS:=100}" "${RUN_NAME:=ar_140m_100M}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train ar "$@"
