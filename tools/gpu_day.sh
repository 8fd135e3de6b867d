#!/usr/bin/env bash
# What one GPU shows in an hour or in minutes: bash tools/gpu_day.sh OUT [MINUTES]
# In this order, each step safe to lose: tests that need a GPU; training speed with traces; the same model in plain PyTorch; then the
# crossover of AR and MDM on little text (examples_scaling/sweeps/crossover_1m.yaml) for the minutes that are left. Everything is in OUT.
# PYTHON: an interpreter with torch (default: python3). WHEELS: a folder of wheels that it lacks, installed into OUT/site.
# STEPS: which of "tests speed plain crossover". MODELS: presets whose speed is measured.
# A signal ends the step that runs, and the day, with 128 and its number; what is in OUT stays.
set -uo pipefail
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit $(( $# ? 0 : 2 )); }
refuse() { echo "gpu_day.sh: error: $1" >&2; exit 2; }   # before a minute of the machine is spent
[ $# -le 2 ] || refuse "there are $# arguments; it takes OUT and MINUTES; settings are variables, named by --help"
MINUTES="${2:-60}"
case "$MINUTES" in *[!0-9]*|??????*|0*|'') refuse "MINUTES is $MINUTES; it is a whole number from 1 on; for example 60" ;; esac
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${PYTHON:=python3}" "${WHEELS:=}" "${STEPS=tests speed plain crossover}" "${MODELS:=140M 425M}" "${OBJECTIVES:=ar mdm}" "${TEST_JOBS:=8}"
: "${SPEED_FLAGS:=--seq-length 2048 --micro-batch-size 8 --global-batch-size 32 --bf16}" "${TIMED_STEPS:=10}" "${CROSSOVER:=$REPO/examples_scaling/sweeps/crossover_1m.yaml}"
does() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }
for word in $STEPS; do case "$word" in tests|speed|plain|crossover) ;; *) refuse "STEPS has $word; steps are tests, speed, plain and crossover; correct it" ;; esac; done
command -v "$PYTHON" >/dev/null || refuse "PYTHON is $PYTHON, which is no program; it is an interpreter with torch; correct it"
PYTHON="$(realpath --no-symlinks "$(command -v "$PYTHON")")"
[ -z "$WHEELS" ] || compgen -G "$WHEELS/*.whl" >/dev/null || refuse "WHEELS is $WHEELS, where no wheel is; it is a folder of *.whl files; correct it"
! does crossover || [ -f "$CROSSOVER" ] || refuse "CROSSOVER is $CROSSOVER, which is no file; it is a sweep; correct it"
CROSSOVER="$(realpath "$CROSSOVER")"
mkdir -p "$1" && OUT="$(cd "$1" && pwd)" || exit 1
DEADLINE=$(( $(date +%s) + MINUTES * 60 ))
export PYTHONPATH="$REPO:$REPO/tests${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# step NAME SECONDS COMMAND...: for so long at most, and not past the end of the day; what it says is in OUT/NAME.log.
step() {
  local name="$1" limit="$2" left=$(( DEADLINE - $(date +%s) )) began status=0; shift 2
  [ "$left" -ge 15 ] || { echo "$name: no time left"; return 1; }
  began="$(date +%s)"
  set -m   # a process group of its own, in which Ctrl-C is heard
  timeout --signal INT --kill-after 20 $(( left < limit ? left : limit )) "$@" >"$OUT/$name.log" 2>&1 &
  set +m
  wait "$!" || status=$?
  echo "$name: status $status after $(( $(date +%s) - began )) s"
  return "$status"
}
# stopped NUMBER: the trap of a signal. What runs is asked to end, and is killed 20 seconds later.
stopped() {
  trap '' HUP INT TERM
  local running; running="$(jobs -pr)"
  if [ -n "$running" ]; then kill -INT "$running"; wait; fi
  echo "stopped; what was measured is in $OUT"
  exit $(( 128 + $1 ))
}
trap 'stopped 1' HUP; trap 'stopped 2' INT; trap 'stopped 15' TERM

if [ -n "$WHEELS" ]; then
  step install 120 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$OUT/site" "$WHEELS"/*.whl || { tail -n 3 "$OUT/install.log"; exit 1; }
  export PYTHONPATH="$PYTHONPATH:$OUT/site"
fi
cd "$REPO" || exit 1
"$PYTHON" tools/doctor.py >"$OUT/doctor.txt" 2>&1
if does tests; then
  step tests 300 "$PYTHON" -m pytest -m gpu -rP -n "$TEST_JOBS" -p no:cacheprovider -p no:logging \
    tests/gpu tests/model tests/parallel tests/training/test_step.py   # others need packages that a bare machine lacks
  grep -hE "largest difference|likelihoods:|^E  |^(FAILED|ERROR)|passed|failed" "$OUT/tests.log"
fi
speed() {   # speed NAME FLAGS...
  local name="$1"; shift
  # shellcheck disable=SC2086  # words
  step "$name" 240 "$PYTHON" tools/benchmark.py --steps "$TIMED_STEPS" --json "$OUT/$name.json" $SPEED_FLAGS "$@" || tail -n 3 "$OUT/$name.log"
}
for model in $MODELS; do
  for objective in $OBJECTIVES; do
    if does speed; then speed "speed_${model}_$objective" --model "$model" --objective "$objective" --trace "$OUT/trace_${model}_$objective.json.gz"; fi
    if does plain; then speed "plain_${model}_$objective" --model "$model" --objective "$objective" --micro-batch-size 8 --global-batch-size 8 --compare-plain; fi
  done
done
"$PYTHON" - "$OUT" <<'TABLE'
import json, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*_*.json")):
    found = json.loads(path.read_text())
    mfu, plain = found["mfu"], found.get("times_faster_than_plain")
    print(f"{path.stem}: {found['tokens_per_second']:,.0f} tokens/s, {found['tflops_per_device']:.0f} TFLOP/s, MFU "
          f"{'unknown' if mfu is None else format(mfu, '.1%')}, {found['peak_memory_gib']:.1f} GiB, step {found['step_seconds']['median']:.4f} s"
          + ("" if plain is None else f", {plain:.2f} times faster than plain"))
    for cost in found.get("largest_costs", [])[:8]:
        print(f"    {cost['share']:5.1%} {cost['ms']:8.2f} ms {cost['calls']:6.0f} calls  {cost['name'][:90]}")
TABLE
# text FOLDER: the documentation of Python's standard library as token files, which every machine has.
text() {
  local encode=(tools/preprocess_data.py --append-eod --tokenizer-model "$1/tokenizer")
  [ ! -e "$1/all_text_document.idx" ] || return 0
  "$PYTHON" tools/make_sample_corpus.py --output-dir "$1" --validation-fraction 0.03 &&
    "$PYTHON" tools/train_tokenizer.py --input "$1/train.jsonl" --vocab-size 500 --output "$1/tokenizer" &&
    "$PYTHON" "${encode[@]}" --input "$1/validation.jsonl" --output-prefix "$1/valid" &&
    "$PYTHON" "${encode[@]}" --input "$1/train.jsonl" --output-prefix "$1/all"
}
if does crossover; then
  export -f text; export PYTHON
  ! grep -q runs/crossover-text "$CROSSOVER" || step text 120 bash -c 'text runs/crossover-text' || tail -n 3 "$OUT/text.log"
  step crossover $(( DEADLINE - $(date +%s) - 60 )) "$PYTHON" tools/sweep.py "$CROSSOVER" run --jobs "${JOBS:-4}"
  tail -n 5 "$OUT/crossover.log"
  DEADLINE=$(( $(date +%s) + 60 ))   # stopped runs can be reported, and continued by the same command another day
  runs="$(sed -n 's/^output: *//p' "$CROSSOVER")"
  if [ -d "$runs" ]; then step report 60 "$PYTHON" tools/report.py "$runs" --output "$OUT/report"; tail -n 20 "$OUT/report.log"; fi
fi
true
