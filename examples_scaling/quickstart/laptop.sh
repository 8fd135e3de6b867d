#!/usr/bin/env bash
# From a bare machine to a report: one small transformer learns the same text twice, as a causal model (AR) and as a
# masked-diffusion model (MDM). Ctrl-C stops it, the same command continues. Everything lands in RUN_DIR (runs/laptop).
: "${RUN_NAME:=laptop}" "${DOCUMENTS:=50}" "${VOCAB_SIZE:=1000}" "${LAYERS:=3}" "${HIDDEN:=96}" "${HEADS:=3}" "${EPOCHS:=100}"
: "${SEQ_LENGTH:=128}" "${MICRO_BATCH_SIZE:=16}" "${GLOBAL_BATCH_SIZE:=16}" "${LR:=2e-3}" "${MIN_LR:=2e-4}" "${NUM_MC:=4}"
: "${EVAL_INTERVAL:=100}" "${EVAL_ITERS:=full}" "${SAVE_INTERVAL:=100}" "${KEEP_LAST:=1}" "${LOG_INTERVAL:=50}" "${TOKENIZER_FLAGS=}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
trap 'echo "stopped; the same command continues"; exit 130' INT
export OMP_WAIT_POLICY=PASSIVE   # threads that wait must not hold a core that another program wants
echo "Training and evaluation take about 10 minutes on 2 CPU cores; the first run also installs packages (3 minutes or more)."
bash "$REPO/install.sh" ${INSTALL_FLAGS:+"$INSTALL_FLAGS"}
TEXT="$RUN_DIR/text-$DOCUMENTS-$VOCAB_SIZE"
encode=(preprocess_data.py --append-eod --tokenizer-model "$TEXT/tokenizer")
once "$TEXT/validation.jsonl" make_sample_corpus.py --output-dir "$TEXT"
once "$TEXT/tokenizer" train_tokenizer.py --input "$TEXT/train.jsonl" --vocab-size "$VOCAB_SIZE" --output "$TEXT/tokenizer"
head -n "$DOCUMENTS" "$TEXT/train.jsonl" >"$TEXT/few.jsonl"   # the first documents are the whole training set
once "$TEXT/train_text_document.idx" "${encode[@]}" --input "$TEXT/few.jsonl" --output-prefix "$TEXT/train"
once "$TEXT/valid_text_document.idx" "${encode[@]}" --input "$TEXT/validation.jsonl" --output-prefix "$TEXT/valid"
for objective in ar mdm; do
  RUN_DIR="$RUN_DIR/$objective" TRAIN_DATA="$TEXT/train_text_document" VALID_DATA="$TEXT/valid_text_document" \
    train "$objective" --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS"
done
"$ENV_PYTHON" "$REPO/tools/report.py" "$RUN_DIR/ar" "$RUN_DIR/mdm" --output "$RUN_DIR/report"
