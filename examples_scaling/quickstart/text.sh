# shellcheck shell=bash
# Sourced by laptop.sh: prepare_text FOLDER makes, from TEXT or the sample corpus, two sides of text, a tokenizer and token files there,
# and sets TRAIN_DATA, VALID_DATA and TOKENIZER_MODEL. What is there already stays.
prepare_text() {
  local folder="$1" more encode=(preprocess_data.py --append-eod --tokenizer-model "$1/tokenizer")
  # shellcheck disable=SC2034  # read by common.sh
  TRAIN_DATA="$folder/all_text_document" VALID_DATA="$folder/valid_text_document" TOKENIZER_MODEL="$folder/tokenizer"
  read -r -a more <<<"--max-validation-bytes 70000 $SPLIT_FLAGS"   # so much takes seconds at every validation
  if [ -n "$TEXT" ]; then tool split_data.py --input "$TEXT" --output-dir "$folder" "${more[@]}"   # every time: it refuses changed text
  else once "$folder/validation.jsonl" make_sample_corpus.py --output-dir "$folder" --validation-fraction 0.03; fi
  once "$folder/tokenizer" train_tokenizer.py --input "$folder/train.jsonl" --vocab-size "$VOCAB_SIZE" --output "$folder/tokenizer"
  once "$VALID_DATA.idx" "${encode[@]}" --input "$folder/validation.jsonl" --output-prefix "$folder/valid"
  once "$TRAIN_DATA.idx" "${encode[@]}" --input "$folder/train.jsonl" --output-prefix "$folder/all"
  [ -n "$DOCUMENTS" ] || return 0
  TRAIN_DATA="$folder/first_$DOCUMENTS"   # little data, often
  once "$TRAIN_DATA.idx" make_subset.py --input "$folder/all_text_document" --output "$TRAIN_DATA" --documents "$DOCUMENTS"
}
# write_samples OBJECTIVE: texts of its best checkpoint for the report; a run of an older version may have kept none.
write_samples() {
  local file="$RUN_DIR/$1/samples.jsonl" status=0
  set -- generate.py --load "$RUN_DIR/$1" --load-tag best --prompt "$PROMPT" --max-new-tokens $((SEQ_LENGTH / 2)) --num-samples 2 --temperature 0.8 --json
  if [ "$DRY_RUN" = 1 ]; then tool "$@"; return; fi
  if tool "$@" >"$file.part"; then mv "$file.part" "$file"; else status=$?; rm -f "$file.part"; fi
  [ -z "$STOPS" ] || return "$status"   # stopped: what would follow is not started
}
