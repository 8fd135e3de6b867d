"""What --dry-run of an example script says beside the command: the flags are checked as on the target, whose layout is named.

python tools/_target.py pretrain_mdm.py 16 --model 140M ...
"""

from __future__ import annotations

import sys

from _run import run


def main() -> None:
    """Print the layout of a training command on so many processes.

    Raises:
        UserError: the command would be refused there.
    """
    from megatron.objectives import parse

    program, world, *flags = sys.argv[1:]
    notes: list[str] = []
    settings = parse(
        flags, objective="mdm" if program == "pretrain_mdm.py" else "ar", world_size=int(world), notes=notes
    )
    parallel, batch = settings.parallel, settings.run
    engine = "FSDP2, " * (parallel.engine == "fsdp2")
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = int(world) // (tp * pp)
    whole = batch.global_batch_size or batch.micro_batch_size * dp
    for line in (
        *notes,
        f"{world} processes: tp {tp} x pp {pp} x dp {dp}, {engine}ZeRO {parallel.zero_stage}, "
        f"{'bf16' if batch.bf16 else 'fp32'}",
        f"global batch {whole} = micro {batch.micro_batch_size} x dp {dp} x "
        f"{whole // (batch.micro_batch_size * dp)} accumulated",
    ):
        print(f"# {line}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
