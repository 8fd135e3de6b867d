#!/usr/bin/env bash
# Exact likelihood of the whole validation set: 0.025 h and $0.61 a billion tokens on 8 H100 (estimated, not measured).
# Under the run of train_ar.sh; CHECKPOINT names another run directory.
: "${MODEL:=140M}" "${RUN_NAME:=arm_best_on_100m}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
evaluate ar "$@"
