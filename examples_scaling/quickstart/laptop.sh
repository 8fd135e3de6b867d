#!/usr/bin/env bash
# From a bare machine to a report: one small transformer learns the same text twice, as a causal model (AR) and as a
# masked-diffusion model (MDM). Ctrl-C stops it, the same command continues. Everything lands in RUN_DIR (runs/laptop).
: "${RUN_NAME:=laptop}" "${DOCUMENTS:=24}" "${VOCAB_SIZE:=500}" "${LAYERS:=3}" "${HIDDEN:=96}" "${HEADS:=3}" "${TRAIN_SAMPLES:=20000}"
: "${SEQ_LENGTH:=128}" "${MICRO_BATCH_SIZE:=8}" "${GLOBAL_BATCH_SIZE:=8}" "${LR:=3e-3}" "${MIN_LR:=3e-4}" "${NUM_MC:=2}"
: "${EVAL_INTERVAL:=100}" "${EVAL_ITERS:=full}" "${SAVE_INTERVAL:=500}" "${KEEP_LAST:=1}" "${LOG_INTERVAL:=50}" "${TOKENIZER_FLAGS=}"
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
export OMP_WAIT_POLICY=PASSIVE   # threads that wait must not hold a core that another program wants
echo "Training and evaluation take 7 to 10 minutes on 2 CPU cores; the first run also installs packages (3 minutes or more)."
supervise bash "$REPO/install.sh" ${INSTALL_FLAGS:+"$INSTALL_FLAGS"}
TEXT="$RUN_DIR/text-$VOCAB_SIZE" TRAIN="$RUN_DIR/text-$VOCAB_SIZE/first_$DOCUMENTS"
encode=(preprocess_data.py --append-eod --tokenizer-model "$TEXT/tokenizer")
once "$TEXT/validation.jsonl" make_sample_corpus.py --output-dir "$TEXT" --validation-fraction 0.03
once "$TEXT/tokenizer" train_tokenizer.py --input "$TEXT/train.jsonl" --vocab-size "$VOCAB_SIZE" --output "$TEXT/tokenizer"
once "$TEXT/valid_text_document.idx" "${encode[@]}" --input "$TEXT/validation.jsonl" --output-prefix "$TEXT/valid"
once "$TEXT/all_text_document.idx" "${encode[@]}" --input "$TEXT/train.jsonl" --output-prefix "$TEXT/all"
once "$TRAIN.idx" make_subset.py --input "$TEXT/all_text_document" --output "$TRAIN" --documents "$DOCUMENTS"   # little data, often
for objective in ar mdm; do
  RUN_DIR="$RUN_DIR/$objective" TRAIN_DATA="$TRAIN" VALID_DATA="$TEXT/valid_text_document" \
    train "$objective" --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS" "$@"
done
tool report.py "$RUN_DIR/ar" "$RUN_DIR/mdm" --output "$RUN_DIR/report"
echo "took $((SECONDS / 60)) minutes"
