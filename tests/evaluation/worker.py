"""One process of the two-process evaluation in test_layouts.py: scores local tasks and writes them (rank 0)."""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from megatron.commands.likelihood import build_parser, judge, samplers
from megatron.evaluation.lm_eval.models import MegatronAR, MegatronMDM
from megatron.evaluation.lm_eval.tasks import task_loader
from megatron.evaluation.lm_eval.uniform import MegatronUniform
from megatron.inference.model import load_model
from megatron.parallel.context import ParallelContext

MODELS = {
    "ar": (MegatronAR, {}),
    "mdm": (MegatronMDM, {"num_mc": 8}),
    "blocks": (MegatronMDM, {"num_mc": 8}),
    "uniform_diffusion": (MegatronUniform, {"num_mc": 4}),
}
COURT = ["--policies", "left-to-right,confidence,random", "--tokens-per-step", "4", "--orders", "2"]


def main(folder: str, tasks: list[str]) -> None:
    from lm_eval.evaluator import simple_evaluate  # not in the tests that import MODELS: seconds to load

    dist.init_process_group("gloo")
    for tp_size in (1, 2):
        context = ParallelContext.create(tp_size=tp_size)
        for name, (cls, options) in MODELS.items():
            lm = cls(
                model=load_model(f"{folder}/{name}", context=context),
                cache_dir=f"{folder}/cache-{name}-{tp_size}",
                **options,
            )
            results = simple_evaluate(
                lm, tasks=tasks, task_manager=task_loader(tasks), log_samples=True, bootstrap_iters=0
            )
            answers = lm.summary.merge(lm._gather(lm.summary)).as_dict()
            if context.is_first_rank:
                scores = {
                    task: sorted((s["doc_id"], s["resps"]) for s in samples)
                    for task, samples in results["samples"].items()
                }
                with open(f"{folder}/{name}-tp{tp_size}.json", "w") as file:
                    json.dump(
                        {"scores": scores, "answers": {task: entry["answers"] for task, entry in answers.items()}}, file
                    )
        judged = [
            *(f"{folder}/{name}" for name in MODELS),
            f"3*{folder}/ar+1*{folder}/ar-tp2",
            "--valid-data-path",
            f"{folder}/valid",
            "--num-mc",
            "2",
        ]
        options = build_parser().parse_args([*judged, "--output", f"{folder}/court-tp{tp_size}.json", *COURT])
        judge(options, samplers(options), context)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
