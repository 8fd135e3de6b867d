#!/usr/bin/env bash
# From a bare machine to a report: 7 to 10 minutes on 2 CPU cores, and 3 or more to install (measured). A small transformer
# learns one text as a causal (AR) and as a masked-diffusion model (MDM). Ctrl-C stops it, the same command continues; all is in RUN_DIR.
# TEXT=file-or-folder takes your own text (8 kB or more of .txt .md .rst .py .html .jsonl .parquet; .gz .zst) into runs/laptop-NAME;
# DOCUMENTS=N trains on the first N only. SPLIT_FLAGS go to tools/split_data.py, for example SPLIT_FLAGS="--json-keys body".
: "${TEXT:=}" "${RUN_NAME:=laptop${TEXT:+-$(basename -- "$TEXT" | tr -c 'A-Za-z0-9._\n-' _)}}" "${DOCUMENTS=$([ -n "$TEXT" ] || echo 24)}"
: "${VOCAB_SIZE:=500}" "${LAYERS:=3}" "${HIDDEN:=96}" "${HEADS:=3}" "${TRAIN_SAMPLES:=20000}" "${SPLIT_FLAGS:=}"
: "${SEQ_LENGTH:=128}" "${MICRO_BATCH_SIZE:=8}" "${GLOBAL_BATCH_SIZE:=8}" "${LR:=3e-3}" "${MIN_LR:=3e-4}" "${NUM_MC:=2}" "${PROMPT:=The}"
: "${EVAL_INTERVAL:=100}" "${EVAL_ITERS:=full}" "${SAVE_INTERVAL:=500}" "${KEEP_LAST:=1}" "${LOG_INTERVAL:=50}"; PROCESSES="${GPUS_PER_NODE:-1}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=text.sh
source "$(dirname "${BASH_SOURCE[0]}")/text.sh"; GPUS_PER_NODE="$PROCESSES"   # a number before common.sh says there are GPUs
export OMP_WAIT_POLICY=PASSIVE   # threads that wait must not hold a core that another program wants
[ -z "$TEXT" ] || [ -e "$TEXT" ] || die "TEXT=$TEXT does not exist" "it is a file or a folder of text" "check the name"
printf '%s\n' "Training and evaluation take 7 to 10 minutes on 2 CPU cores; the first run also" "installs packages (3 minutes or more)."
NEXT_STEPS="" supervise bash "$REPO/install.sh" ${INSTALL_FLAGS:+"$INSTALL_FLAGS"}
prepare_text "$RUN_DIR/text-$VOCAB_SIZE"
for objective in ar mdm; do
  RUN_DIR="$RUN_DIR/$objective" train "$objective" --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS" --save-best "$@"
  write_samples "$objective"
done
tool report.py "$RUN_DIR/ar" "$RUN_DIR/mdm" --output "$RUN_DIR/report"
[ "$DRY_RUN" = 1 ] || printf 'took %d minutes. Next:  source %q\n  megatron report %q %q --serve\n  megatron generate --load %q --load-tag best --prompt %q\n%s\n' \
  $((SECONDS / 60)) "$BIN/activate" "$RUN_DIR/ar" "$RUN_DIR/mdm" "$RUN_DIR/mdm" "$PROMPT" "  TEXT=your-folder bash examples_scaling/quickstart/laptop.sh"
