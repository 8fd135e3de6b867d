#!/usr/bin/env bash
# Installs what this project needs into the active virtual environment, or into .venv in the repository.
#
#   bash install.sh                        needed packages; about a second when they are there already
#   bash install.sh --with eval,logging    extras: eval, logging, test
#   bash install.sh --with fa4             optional accelerators, for a GPU: apex, fa3, fa4, liger; never required
#   bash install.sh --check                show what is installed and what is missing; changes nothing
#   bash install.sh --deps-only            do not link this checkout into the environment (pip install -e)
#   bash install.sh --print-python         print the interpreter that the scripts use
#
# Environment variables:
#   PYTHON            interpreter that makes .venv (default: the first of python3, python3.13 ... python3.10 that fits)
#   TORCH_VERSION     torch release to install (default 2.13.0; 2.11 to 2.14 work)
#   TORCH_INDEX_URL   extra package index with the torch build you want, for another CUDA, ROCm or a mirror.
#                     Default: none with an NVIDIA GPU or on macOS; else PyTorch's public index of CPU builds,
#                     asked only when pip's own configuration offers no CPU build.
#   APEX_SOURCE, FA3_SOURCE   where --with apex and fa3 build from (default: the repositories of their makers)
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
TORCH_VERSION="${TORCH_VERSION:-2.13.0}"
CPU_INDEX_URL="https://download.pytorch.org/whl/cpu"
ACTION="install"
LINK=1
WITH=""

say() { echo "install.sh: $*"; }
die() { echo "install.sh: error: $1; $2; $3" >&2; exit 1; }   # what was given, the rule, the fix

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
pip() { "$ENV_PYTHON" -m pip --no-input --disable-pip-version-check "$@"; }
missing() { "$ENV_PYTHON" "$REPO/tools/check_environment.py" --missing --with "$WITH"; }

parse_options() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --with) [ $# -gt 1 ] || die "--with has no value" "it takes names" "use --with eval,test"
              WITH="$WITH,$2"; shift ;;
      --with=*) WITH="$WITH,${1#--with=}" ;;
      --check) ACTION="check" ;;
      --print-python) ACTION="print" ;;
      --deps-only) LINK=0 ;;
      -h|--help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
      *) die "unknown option $1" "the options are --with, --check, --deps-only, --print-python, --help" "see --help" ;;
    esac
    shift
  done
}

# Sets ENV_PYTHON to the interpreter of the active environment, else of .venv; empty when there is neither.
find_environment() {
  ENV_PYTHON=""
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    ENV_PYTHON="$VIRTUAL_ENV/bin/python"
    [ -x "$ENV_PYTHON" ] || die "VIRTUAL_ENV is $VIRTUAL_ENV, which has no bin/python" \
      "an active environment must exist" "run: unset VIRTUAL_ENV (or activate another one)"
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != "base" ]; then
    ENV_PYTHON="$CONDA_PREFIX/bin/python"
  elif [ -x "$REPO/.venv/bin/python" ]; then
    ENV_PYTHON="$REPO/.venv/bin/python"
  fi
  [ -z "$ENV_PYTHON" ] || supported "$ENV_PYTHON" || die "$ENV_PYTHON is $("$ENV_PYTHON" --version 2>&1)" \
    "this project runs on Python 3.10 to 3.13" "activate an environment of one of these, or remove it and run again"
}

make_environment() {
  local candidate python="" candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if supported "$candidate"; then python="$candidate"; break; fi
  done
  [ -n "$python" ] || die "${candidates[0]} is $("${candidates[0]}" --version 2>/dev/null || echo "not there")" \
    "this project runs on Python 3.10 to 3.13" "install one of these, or run: PYTHON=/path/to/python3.12 bash install.sh"
  say "making $REPO/.venv with $("$python" --version)"
  "$python" -m venv --clear "$REPO/.venv" || { rm -rf "$REPO/.venv"; die "$python -m venv failed" \
    "a virtual environment needs Python's venv module" "on Debian or Ubuntu run: apt-get install python3-venv"; }
  ENV_PYTHON="$REPO/.venv/bin/python"
}

install_torch() {
  local build="torch==$TORCH_VERSION" index="${TORCH_INDEX_URL:-}"
  if [ -z "$index" ] && ! has_gpu && [ "$(uname -s)" = "Linux" ]; then
    # The default Linux build carries gigabytes of CUDA libraries: ask for the CPU build by its full name, first from
    # the places that pip is configured for.
    build="torch==$TORCH_VERSION+cpu"
    pip install --quiet --dry-run --no-deps "$build" >/dev/null 2>&1 || index="$CPU_INDEX_URL"
  fi
  say "installing $build${index:+ with the extra index $index}"
  pip install "$build" ${index:+--extra-index-url "$index"} || die "pip could not install $build" \
    "it comes from pip's configured index${index:+ and $index}" "check the network, or set TORCH_INDEX_URL, and run again"
}

install_needed() {
  local items=() line
  while IFS= read -r line; do [ -z "$line" ] || items+=("$line"); done <<<"$MISSING"
  say "installing ${items[*]}"
  # Without a compiler DeepSpeed installs as plain Python; it builds operations only where DS_BUILD_OPS=1 asks for it.
  DS_BUILD_OPS="${DS_BUILD_OPS:-0}" pip install "${items[@]}" || die "pip could not install: ${items[*]}" \
    "they come from the index that pip is configured for" "check the network and run again; what is finished is kept"
}

# Optional: a machine without a GPU, or a failing build, is reported and changes nothing else.
install_accelerator() {
  local name="$1" distribution="$2" fallback="$3"; shift 3
  if "$ENV_PYTHON" -c "from importlib import metadata; metadata.version('$distribution')" 2>/dev/null; then
    say "$name: installed"
  elif ! has_gpu; then
    say "$name: not installed (no NVIDIA GPU here), falling back to $fallback"
  elif pip install setuptools wheel packaging ninja && pip install "$@"; then
    say "$name: installed"
  else
    say "$name: not installed (its build failed, see above), falling back to $fallback"
  fi
}

install_accelerators() {
  case ",$WITH," in *[,\ ]apex[,\ ]*)
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 install_accelerator apex apex "torch's fused AdamW" --no-build-isolation \
      --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" \
      "${APEX_SOURCE:-git+https://github.com/NVIDIA/apex.git}" ;; esac
  case ",$WITH," in *[,\ ]fa3[,\ ]*)
    install_accelerator fa3 flash-attn-3 "torch's own attention" --no-build-isolation \
      "${FA3_SOURCE:-git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper}" ;; esac
  case ",$WITH," in *[,\ ]fa4[,\ ]*)
    install_accelerator fa4 flash-attn-4 "torch's own attention" --pre flash-attn-4 ;; esac
  case ",$WITH," in *[,\ ]liger[,\ ]*)
    install_accelerator liger liger-kernel "PyTorch's SwiGLU" liger-kernel ;; esac
}

link_checkout() {
  local linked
  linked="$("$ENV_PYTHON" -I -c "from importlib import metadata
print(metadata.distribution('megatron-mdm').read_text('direct_url.json') or '')" 2>/dev/null || true)"
  case "$linked" in
    "") say "linking this checkout into the environment (import megatron)"
        pip install --quiet --no-deps -e "$REPO" || say "could not link; run programs from $REPO, which needs no link" ;;
    *"file://$REPO\""*) ;;
    *) say "another checkout is linked into this environment; programs run from $REPO use their own code all the same" ;;
  esac
}

next_steps() {
  [ "$(command -v python)" = "$ENV_PYTHON" ] || echo "To use it in this shell:  source $(printf %q "$(dirname "$ENV_PYTHON")/activate")"
  echo "Next:  bash examples_scaling/quickstart/laptop.sh   AR and MDM on a small text, a report, about 10 minutes"
  echo "       python -m megatron --help                    every program"
  echo "       bash download.sh --help                      data and checkpoints of the paper"
}

main() {
  parse_options "$@"
  find_environment
  if [ "$ACTION" = "print" ]; then
    [ -n "$ENV_PYTHON" ] || die "no environment is active and $REPO/.venv is missing" "the scripts need one" "run: bash install.sh"
    echo "$ENV_PYTHON"; return
  fi
  if [ "$ACTION" = "check" ]; then
    if has_gpu; then nvidia-smi -L; else echo "no NVIDIA GPU: the CPU build of torch is used"; fi
    [ -n "$ENV_PYTHON" ] || die "no environment is active and $REPO/.venv is missing" "--check looks into one" "run: bash install.sh"
    "$ENV_PYTHON" "$REPO/tools/check_environment.py" --with "$WITH"; return
  fi
  [ -n "$ENV_PYTHON" ] || make_environment
  MISSING="$(missing)"
  if [ -n "$MISSING" ]; then
    "$ENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$ENV_PYTHON" -m ensurepip >/dev/null || die "$ENV_PYTHON has no pip" \
      "install.sh installs with pip" "run: uv pip install pip, or make the environment with python3 -m venv"
    case "$MISSING" in *torch\>*) install_torch; MISSING="$(missing)" ;; esac
    [ -z "$MISSING" ] || install_needed
    MISSING="$(missing)"
    [ -z "$MISSING" ] || die "still missing: $(echo "$MISSING" | tr '\n' ' ')" "pip reported success" "run: bash install.sh --check"
  fi
  install_accelerators
  [ "$LINK" = 0 ] || link_checkout
  say "everything needed is installed in $(dirname "$(dirname "$ENV_PYTHON")")"
  [ -z "${NEXT_STEPS-1}" ] || next_steps   # a script that goes on by itself sets it to nothing
}

main "$@"
