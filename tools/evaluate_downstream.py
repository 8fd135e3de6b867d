#!/usr/bin/env python3
"""Evaluate a checkpoint of any layout, or a Hugging Face export, on downstream tasks (docs/evaluation.md).

python tools/evaluate_downstream.py --load RUN --task_list arc_easy,my_items.jsonl --results_path results.json
"""

from _run import door

if __name__ == "__main__":
    door("downstream")
