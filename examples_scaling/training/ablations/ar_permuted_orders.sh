#!/usr/bin/env bash
# Causal model over several token orders: 0.76 h and $18 on 8 H100 (estimated, not measured).
# NUM_ORDERS of them, the first left to right: noisy orders (ORDERS=noisy) or uniformly random ones.
# Everything else is as in ../ar/140m_100M.sh.
: "${MODEL:=140M}" "${EPOCHS:=100}" "${NUM_ORDERS:=16}" "${ORDERS:=noisy}" "${RUN_NAME:=ar_permuted_orders_${NUM_ORDERS}_${ORDERS}}"
# shellcheck source=../../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
ORDER_FLAGS=(--num-order-list "$NUM_ORDERS")
case "$ORDERS" in
  noisy) ORDER_FLAGS+=(--use-predefined-order) ;;
  uniform) ;;
  *) die "ORDERS=$ORDERS" "orders are noisy or uniform" "set one of them" ;;
esac
train ar "${ORDER_FLAGS[@]}" "$@"
