#!/usr/bin/env python
"""Evaluate a checkpoint of any layout, or a Hugging Face export, on downstream tasks (docs/evaluation.md).

python tools/evaluate_downstream.py --load RUN --task_list arc_easy,my_items.jsonl --results_path results.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.evaluation.lm_eval.command import run_downstream

if __name__ == "__main__":
    try:
        sys.exit(run_downstream())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
