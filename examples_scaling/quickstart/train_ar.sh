#!/usr/bin/env bash
# The 140M causal model, 50 epochs over 100M tokens of C4: 0.38 h and $9.1 on 8 H100 (estimated, not measured).
# arm_best_on_100m of arXiv 2507.15857.
: "${MODEL:=140M}" "${EPOCHS:=50}" "${DROPOUT:=0.1}" "${RUN_NAME:=arm_best_on_100m}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
train ar "$@"
