#!/usr/bin/env bash
# Download data sets, the published checkpoints and the GPT-2 tokenizer: ./download.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$(bash "$here/install.sh" --print-python)"
exec "$python" "$here/tools/download.py" "$@"
