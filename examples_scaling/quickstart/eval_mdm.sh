#!/usr/bin/env bash
# Likelihood bound of the whole validation set: 0.59 h and $14 a billion tokens on 8 H100 (estimated, not measured).
# Under the run of train_mdm.sh, NUM_MC noise draws a sample.
: "${MODEL:=425M}" "${NUM_MC:=8}" "${RUN_NAME:=mdm_best_on_100m}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
evaluate mdm "$@"
