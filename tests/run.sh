#!/usr/bin/env bash
# Installs what the tests need, then runs ruff, mypy and pytest. Further arguments go to pytest:
#   bash tests/run.sh                    everything (14 minutes on 2 CPU cores, and 3 to install)
#   bash tests/run.sh tests/data -k blend
#   bash tests/run.sh --fast             single modules only (a minute)
#   bash tests/run.sh --storm            kills, exits, command lines and damages at length instead, with their counts (hours)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FAST=()
if [ "${1:-}" = --fast ]; then
  shift
  FAST=(tests/config tests/model tests/objectives tests/runs tests/test_*.py tests/checkpoint/test_select.py tests/data/test_order.py)
fi
STORMS=()
if [ "${1:-}" = --storm ]; then
  shift
  export STORM=1
  STORMS=(-s tests/checkpoint/test_corruption.py tests/data/test_corruption.py tests/training/test_command_lines.py
    tests/training/test_exits.py tests/training/test_kill_storm.py)
fi

NEXT_STEPS="" bash install.sh --deps-only --with test
PYTHON="$(bash install.sh --print-python)"
PATH="$(dirname "$PYTHON"):$PATH"   # deepspeed, torchrun and shellcheck of the environment
export PATH
# One thread a process: several gloo ranks share the cores, and sums keep one order.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false WANDB_MODE=offline HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONDONTWRITEBYTECODE   # hundreds of programs are started: none compiles the package again

echo "== ruff"; "$PYTHON" -m ruff check .; "$PYTHON" -m ruff format --check --quiet .
echo "== mypy"; "$PYTHON" -m mypy
if [ "${#STORMS[@]}" -gt 0 ]; then   # one at a time: kills and exits are timed
  echo "== storms"; exec "$PYTHON" -m pytest -q --timeout 7200 --durations=15 "${STORMS[@]}" "$@"
fi
# Each test has a time limit (pyproject.toml); the stack of a hanging one is printed before it is stopped. Four processes, on
# two cores too, because many tests wait: one takes the tests that run on several gloo workers, the others the rest, file by file.
echo "== pytest"; exec "$PYTHON" -m pytest -n 4 --dist loadgroup --durations=15 ${FAST[@]+"${FAST[@]}"} "$@"
