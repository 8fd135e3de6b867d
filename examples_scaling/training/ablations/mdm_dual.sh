#!/usr/bin/env bash
# AR and masked diffusion in one model: 0.76 h and $18 on 8 H100 (estimated, not measured).
# A share AR_SHARE of the samples is AR; both are validated. Everything else is as in ../mdm/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${AR_SHARE:=0.5}" "${RUN_NAME:=mdm_dual_${AR_SHARE}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
train mdm --objective dual --dual-ar-share "$AR_SHARE" "$@"
