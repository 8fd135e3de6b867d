"""``lm_eval`` with the models of this project: ``python -m megatron.evaluation --model megatron_mdm ...``."""

from lm_eval.__main__ import cli_evaluate

import megatron.evaluation.lm_eval.models
import megatron.evaluation.lm_eval.uniform  # noqa: F401 - they register megatron_ar, megatron_mdm and megatron_uniform

if __name__ == "__main__":
    cli_evaluate()
