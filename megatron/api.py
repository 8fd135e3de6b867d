"""What ``import megatron`` offers: train a run, ask a trained model, read what runs wrote.

Each function is loaded when it is first asked for, so that ``import megatron`` imports nothing else. They raise
``megatron.UserError``, in three parts (what was given, the rule, the fix), where the programs print it.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.errors import Failure, UserError, require

if TYPE_CHECKING:
    from megatron.evaluation.scorer import Estimate
    from megatron.generation.text import Completion
    from megatron.inference.model import InferenceModel
    from megatron.runs.run import Run


def train(flags: Mapping[str, Any] | Sequence[str] | str) -> Run:
    """Train, continue or validate a run in this process, and read what it wrote.

    Args:
        flags: those of ``megatron train``, by name (``{"objective": "mdm", "model": "7M", "save": "runs/mdm"}``; underscores
            or hyphens, True for a switch, None for nothing), or a command line, whole or in words. ``save`` is needed (with
            ``skip_train`` ``load`` will do).

    Returns:
        The run: at its end, or stopped and saved before it (``is_finished`` tells).

    Raises:
        UserError: wrong flags or data. Failure: the run failed, and nothing was wrong with them.
        KeyboardInterrupt: Ctrl-C before the first step, or twice.
    """
    is_main = threading.current_thread() is threading.main_thread()
    require(
        is_main, "train() in another thread", "signals stop a run, and reach the main thread alone", "call it there"
    )
    from megatron.commands.pretrain import main
    from megatron.objectives import parse
    from megatron.parallel.connection import connect
    from megatron.parallel.launch import Launch
    from megatron.training.configuration import recorded

    words, launch = _words(flags), Launch.from_environment()
    try:
        run = parse(words, world_size=launch.world_size, recorded=recorded).run
    except SystemExit:
        raise UserError("--help from Python", "it prints flags and leaves", "run megatron train --help") from None
    folder = run.save or (run.load if run.skip_train else None)
    require(folder is not None, "flags without save", "the run is read from there", 'add "save": "runs/NAME"')
    # DeepSpeed keeps the process group of its first engine, so one process keeps one for all its runs.
    if launch.world_size == 1:
        connect(launch)
    status = main(argv=words, raise_errors=True)
    if status == 130:
        raise KeyboardInterrupt
    if status not in (0, 75):
        raise Failure(f"the run ended with status {status}", "its reason was printed", "mend that and train again")
    return load_run(str(folder))


def load_model(
    path: str | Path, *, tag: str | None = None, kind: str | None = None, dtype: str = "float32"
) -> InferenceModel:
    """Load a trained model with its tokenizer, on the GPU where there is one.

    Args:
        path: run directory, one ``global_stepN`` of it, or a folder of ``megatron convert to-hf``; ``"RUN+RUN"`` or
            ``"0.7*RUN+0.3*RUN"``: the mean of their probabilities as one model.
        tag: checkpoint of the run, such as ``global_step100``; default: the newest that verifies.
        kind: of the weights: ``weight`` (as trained) or ``ema`` (their average).
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        The model. ``logits(input_ids)`` maps [batch, seq] int64 to [batch, seq, vocab]; row i of a causal model is about token
        i + 1, of a masked one about token i, given all others that are not ``mask_id`` (of a model of blocks: those of its own
        block and the ones before), of uniform-state diffusion about token i, given a text of which any token may be noise.

    Raises:
        UserError: nothing to load there, or damaged.
    """
    from megatron.inference.model import load_model as load

    return load(path, tag=tag, kind=kind, dtype=dtype)


def log_likelihood(
    model: InferenceModel,
    text: str,
    *,
    context: str = "",
    num_draws: int = 128,
    estimator: str = "exact-count",
    seed: int = 1234,
) -> Estimate:
    """Log-likelihood of a text: exact for a causal model, for diffusion an estimate of a bound.

    Args:
        model: of :func:`load_model`.
        text: what is scored, in windows of the longest input where it is longer.
        context: what is given; default: an end of document.
        num_draws: draws of noise (diffusion).
        estimator: of masked diffusion; docs/evaluation.md compares them, and ``left-to-right`` is exact.
        seed: of the noise.

    Returns:
        Nats in all, with ``standard_error`` over the noise and ``kind`` (``exact`` or ``bound``).

    Raises:
        UserError: nothing to score, or a model without a tokenizer.
    """
    from megatron.evaluation.likelihood import log_likelihood as score

    _check_texts("text", [text])
    _check_texts("context", [context])
    return score(model, text, context=context, num_draws=num_draws, estimator=estimator, seed=seed)


def generate(model: InferenceModel, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
    """Continue prompts, or fill the gaps in them, as ``megatron generate`` does.

    Args:
        model: of :func:`load_model`.
        prompts: one or several; a diffusion model fills ``[MASK]`` and ``[MASK:8]`` (one and eight tokens).
        options: flags of ``megatron generate``, such as ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``,
            ``num_samples``, ``steps``, ``order``.

    Returns:
        One for every prompt and sample: ``text``, what was added, or the whole text where gaps were filled; ``tokens``.

    Raises:
        UserError: an unknown option, a number out of range, or a prompt that does not fit.
    """
    from megatron.generation.command import complete

    texts = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
    _check_texts("prompt", texts)
    return complete(model, texts, options)


def load_run(path: str | Path) -> Run:
    """Read a run directory: settings, training log, validations, the best of them. It may be one that still trains.

    Raises:
        UserError: no readable run.json there.
    """
    from megatron.runs.reading import load_run as load

    return load(path)


def find_runs(*places: str | Path) -> list[Run]:
    """Read every run in the given places: run directories, or folders that hold some at any depth.

    Raises:
        UserError: a place holds none.
    """
    from megatron.runs.reading import find_runs as find

    for place in places:
        given = f"find_runs() in {str(place)[:60]!r}"
        require(isinstance(place, (str, Path)), given, "a place is a path", "pass several as find_runs(*PATHS)")
    return find(places)


def compare(runs: Iterable[Run]) -> list[str]:
    """Compare runs as ``megatron compare`` does.

    Returns:
        Lines: each run with its best validation, what differs in each pair, and what follows.

    Raises:
        UserError: something that is no run, such as its folder.
    """
    from megatron.commands.compare import comparison
    from megatron.runs.run import Run

    every = list(runs) if isinstance(runs, Iterable) else [runs]
    for run in every:
        given = f"compare() of {str(run)[:60]!r}"
        require(isinstance(run, Run), given, "it takes runs", 'write compare(find_runs("FOLDER", ...))')
    return comparison(every)


def _check_texts(name: str, texts: Sequence[Any]) -> None:
    for text in texts:
        require(isinstance(text, str), f"{name} {text!r}", "it is text", "pass a str")
        sound = text.encode(errors="replace").decode() == text
        require(sound, f"{name} {ascii(text)[:60]}", "lone surrogates are no text", "decode its bytes as UTF-8")


def _words(flags: Mapping[str, Any] | Sequence[str] | str) -> list[str]:
    """The command line that says the same."""
    words: list[str] = []
    given = f"train() of {str(flags)[:60]!r}"
    if isinstance(flags, Mapping):
        for name, value in flags.items():
            values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            if value is not None:
                words += ["--" + str(name).replace("_", "-"), *map(str, values)]
    elif isinstance(flags, str):
        try:
            words = shlex.split(flags)
        except ValueError as error:
            raise UserError(given, f"a command line is quoted as in a shell ({error})", "close the quotes") from None
    else:
        require(isinstance(flags, Iterable), given, "it takes flags by name, or a command line", "see docs/api.md")
        words = [str(word) for word in flags]
    odd = next((word for word in words if "\0" in word), None)
    require(odd is None, f"the word {odd!r}", "no command line holds that character", "remove it")
    return words
