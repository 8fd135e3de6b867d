#!/usr/bin/env bash
# From a bare machine to a verdict: 7 to 10 minutes on 2 CPU cores, and 3 or more to install (measured). A small transformer
# learns one text as a causal (AR) and as a masked-diffusion model (MDM), each by the best of equally many trials (docs/benchmarks.md);
# exact likelihoods judge them. RECIPE=plain trains both as is usual for much text, into runs/laptop-plain: also for TEXT of megabytes.
# Ctrl-C stops it, the same command continues; all is in RUN_DIR.
# TEXT=file-or-folder takes your own text (8 kB or more of .txt .md .rst .py .html .jsonl .parquet; .gz .zst) into runs/laptop-NAME;
# DOCUMENTS=N trains on the first N only. SPLIT_FLAGS go to tools/split_data.py, for example SPLIT_FLAGS="--json-keys body".
: "${TEXT:=}" "${RECIPE:=tuned}" "${DOCUMENTS=$([ -n "$TEXT" ] || echo 24)}" "${SPLIT_FLAGS:=}" "${PROMPT:=The}" "${EXACT_SAMPLES:=96}"
: "${RUN_NAME:=laptop${TEXT:+-$(basename -- "$TEXT" | tr -c 'A-Za-z0-9._\n-' _)}$([ "$RECIPE" = tuned ] || echo "-$RECIPE")}"
case "$RECIPE" in   # samples, weight decay and dropout of each side; what the caller sets holds for both
  tuned) SIDES=("ar 16000 3.0 0.0" "mdm 32000 1.0 0.0"); : "${EVAL_INTERVAL:=250}" ;;
  plain) SIDES=("ar 20000 0.1 0.0" "mdm 20000 0.1 0.0"); : "${EVAL_INTERVAL:=100}" ;;
  *) SIDES=() ;;
esac
GIVEN_SAMPLES="${TRAIN_SAMPLES:-}" GIVEN_DECAY="${WEIGHT_DECAY:-}" GIVEN_DROPOUT="${DROPOUT:-}"
: "${VOCAB_SIZE:=500}" "${LAYERS:=3}" "${HIDDEN:=96}" "${HEADS:=3}" "${LR:=3e-3}" "${MIN_LR:=3e-4}" "${NUM_MC:=2}" "${EVAL_ITERS:=full}"
: "${SEQ_LENGTH:=128}" "${MICRO_BATCH_SIZE:=8}" "${GLOBAL_BATCH_SIZE:=8}" "${SAVE_INTERVAL:=500}" "${KEEP_LAST:=1}" "${LOG_INTERVAL:=50}"
PROCESSES="${GPUS_PER_NODE:-1}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=text.sh
source "$(dirname "${BASH_SOURCE[0]}")/text.sh"; GPUS_PER_NODE="$PROCESSES"   # a number before common.sh says there are GPUs
export OMP_WAIT_POLICY=PASSIVE   # threads that wait must not hold a core that another program wants
[ -z "$TEXT" ] || [ -e "$TEXT" ] || die "TEXT=$TEXT does not exist" "it is a file or a folder of text" "check the name"
[ "${#SIDES[@]}" = 2 ] || die "RECIPE=$RECIPE" "there are tuned and plain" "leave it out for tuned"
printf '%s\n' "Training and evaluation take 7 to 10 minutes on 2 CPU cores; the first run also" "installs packages (3 minutes or more)."
NEXT_STEPS="" supervise bash "$REPO/install.sh" ${INSTALL_FLAGS:+"$INSTALL_FLAGS"}
prepare_text "$RUN_DIR/text-$VOCAB_SIZE"
for side in "${SIDES[@]}"; do
  read -r objective samples decay dropout <<<"$side"
  TRAIN_SAMPLES="${GIVEN_SAMPLES:-$samples}" WEIGHT_DECAY="${GIVEN_DECAY:-$decay}" DROPOUT="${GIVEN_DROPOUT:-$dropout}"
  RUN_DIR="$RUN_DIR/$objective" train "$objective" --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS" --save-best "$@"
  write_samples "$objective"
done
tool likelihood.py "$RUN_DIR/ar" "$RUN_DIR/mdm" --samples "$EXACT_SAMPLES" --policies random,confidence-reversed --output "$RUN_DIR/likelihood.json"
tool report.py "$RUN_DIR/ar" "$RUN_DIR/mdm" --output "$RUN_DIR/report"
[ "$DRY_RUN" = 1 ] || printf 'took %d minutes. Next:  source %q\n  megatron report %q %q --serve\n  megatron generate --load %q --load-tag best --prompt %q\n%s\n' \
  $((SECONDS / 60)) "$BIN/activate" "$RUN_DIR/ar" "$RUN_DIR/mdm" "$RUN_DIR/mdm" "$PROMPT" "  TEXT=your-folder bash examples_scaling/quickstart/laptop.sh"
