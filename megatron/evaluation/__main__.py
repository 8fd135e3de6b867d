"""``lm_eval`` with the models of this project: ``python -m megatron.evaluation --model megatron_mdm ...``."""

from lm_eval.__main__ import cli_evaluate

import megatron.evaluation.lm_eval.models  # noqa: F401 - registers megatron_ar and megatron_mdm

if __name__ == "__main__":
    cli_evaluate()
