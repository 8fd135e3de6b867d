#!/usr/bin/env python
"""Evaluate a checkpoint of any layout, or a Hugging Face export, on downstream tasks (docs/evaluation.md).

python tools/evaluate_downstream.py --load RUN --task_list arc_easy,my_items.jsonl --results_path results.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools._run import run


def main() -> int:
    """Evaluate as the flags say."""
    from megatron.evaluation.lm_eval.command import run_downstream

    return run_downstream()


if __name__ == "__main__":
    run(main)
