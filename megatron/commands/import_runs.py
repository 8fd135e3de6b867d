"""Runs of others as run directories: rows of a CSV table, or TensorBoard logs, marked as imported with source and licence.

What a field is comes from a column or tag, from one times a factor (tokens_M*1e6, step*4096), or is one number for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.errors import UserError, require
from megatron.screen import wrapped

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.runs.imported import Fields, Imported, Origin, Table

EXAMPLES = (
    "megatron import runs.csv --output runs/others --source 'arXiv 2305.16264' --licence Apache-2.0 --objective ar "
    "--parameters params --tokens tokens --unique-tokens unique_tokens --loss final_validation_loss",
    "megatron import LOGS --output runs/others --source 'our old runs' --licence CC-BY-4.0 --objective ar "
    "--parameters 140M --tokens step*4096 --unique-tokens 100M --loss 'lm loss validation'",
)
LABELS = ("exact", "bound")
MAX_LINES = 8
"""Rows left out that are named one by one."""


def main(arguments: list[str] | None = None) -> None:
    """Import and say what came of it."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="CSV file with column names, or a TensorBoard log (file or folder)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the run directories")
    add("--source", required=True, help="whose runs these are: paper, repository, address; shown beside every number")
    add("--licence", "--license", required=True, help="licence of the numbers, such as Apache-2.0")
    add("--objective", required=True, metavar="NAME", help="what was trained: ar, mdm, or a name of theirs")
    add("--label", choices=LABELS, help="what the loss is (default: exact for ar; others must say)")
    add(
        "--loss",
        required=True,
        metavar="COLUMN",
        help="validation loss, nats per token (bits*0.6931 where it is in bits)",
    )
    add("--parameters", required=True, metavar="COLUMN", help="parameters N of C = 6*N*D")
    add("--unique-tokens", required=True, metavar="COLUMN", help="tokens of one epoch; all: every token was read once")
    add("--tokens", default="", metavar="COLUMN", help="training tokens, with repetitions; or --flops")
    add("--flops", default="", metavar="COLUMN", help="training compute 6*N*D, from which the tokens follow")
    add("--loss-se", default="", metavar="COLUMN", help="standard error of the loss")
    add("--name", default="", metavar="COLUMN", help="name of the run (default: the column run, else numbers)")
    add("--curve", action="store_true", help="rows of one name are validations of one run (default: every row is a "
        "finished run; TensorBoard logs are curves)")  # fmt: skip
    options = parser.parse_args(arguments)
    _import(options)


def _import(options: argparse.Namespace) -> None:
    from megatron.runs.imported import Origin, check_free, collect, name_folders, write_run

    origin = Origin(options.source, options.licence, options.objective, _label(options))
    tables = _tables(options)
    found: list[tuple[Table, Fields, Imported]] = []
    left_out: list[str] = []
    for table in tables:
        fields = _fields(options, table)
        runs, missed = collect(table, fields, curve=options.curve)
        found += [(table, fields, run) for run in runs]
        left_out += missed
    require(found, f"{options.table} has no usable loss", "a run has one validation at least", "name another --loss")
    name_folders(run for *_, run in found)
    for *_, run in found:
        check_free(options.output / run.name)
    for table, fields, run in found:
        write_run(run, options.output / run.name, origin=origin, place=table.place, fields=fields)
    _say(len(found), sum(len(run.points) for *_, run in found), left_out, options.output, origin)


def _tables(options: argparse.Namespace) -> list[Table]:
    from megatron.runs.imported import EVENTS, read_event_logs, read_table

    if not options.table.exists():
        raise UserError(f"{options.table} does not exist", "a table or a TensorBoard log is imported", "check the name")
    is_log = options.table.is_dir() or options.table.name.startswith(EVENTS)
    if not is_log:
        return [read_table(options.table)]
    for flag in ("curve", "name"):
        require(
            not getattr(options, flag),
            f"--{flag} with a TensorBoard log",
            "each folder of a log is one run, called like it",
            f"leave --{flag} out",
        )
    return read_event_logs(options.table)


def _fields(options: argparse.Namespace, table: Table) -> Fields:
    from megatron.runs.imported import Fields

    name = options.name or ("run" if "run" in table.columns else "")
    known = not name or table.name or name in table.columns
    require(known, f"--name {name}", f"the columns are {', '.join(table.columns)}", "name one of them")
    return Fields(
        loss=options.loss,
        parameters=options.parameters,
        unique_tokens=options.unique_tokens,
        tokens=options.tokens,
        flops=options.flops,
        loss_se=options.loss_se,
        name="" if table.name else name,
    )


def _label(options: argparse.Namespace) -> str:
    from megatron.objectives.base import BOUND, EXACT

    require(
        options.label or options.objective == "ar",
        f"--objective {options.objective} without --label",
        "only the loss of ar is exact whatever its settings",
        "add --label exact or --label bound, as the source says",
    )
    return BOUND if options.label == "bound" else EXACT


def _say(runs: int, validations: int, left_out: list[str], output: Path, origin: Origin) -> None:
    lines = [f"{output}: {runs} runs with {validations} validations, imported from {origin.source} ({origin.licence})"]
    lines += [f"  left out: {text}" for text in left_out[:MAX_LINES]]
    if len(left_out) > MAX_LINES:
        lines.append(f"  and {len(left_out) - MAX_LINES} more")
    print(wrapped("\n".join(lines)))
