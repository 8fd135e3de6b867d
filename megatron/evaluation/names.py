"""Names that command lines take: of likelihood estimators and tasks. They import no torch."""

from __future__ import annotations

ESTIMATORS = (
    "exact-count",
    "exact-count-antithetic",
    "bernoulli",
    "bernoulli-independent",
    "left-to-right",
    "random-order",
)

# The nine tasks of arXiv 2507.15857: our name -> (lm-eval's name, data set on the Hugging Face hub).
PAPER_TASKS = {
    "arc_easy": ("arc_easy", "allenai/ai2_arc"),
    "boolq": ("boolq", "aps/super_glue"),
    "copa": ("copa", "aps/super_glue"),
    "hellaswag": ("hellaswag", "Rowan/hellaswag"),
    "piqa": ("piqa", "baber/piqa"),
    "race": ("race", "EleutherAI/race"),
    "winogrande": ("winogrande", "allenai/winogrande"),
    "sciq": ("sciq", "allenai/sciq"),
    "lambada": ("lambada_openai", "EleutherAI/lambada_openai"),
}
