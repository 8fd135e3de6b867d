"""Run a list of commands in one folder, each in a fork of a process that has the large packages loaded already.

``python miniature.py COMMANDS.json RESULTS.json``: from [[name, words, is_small, variables], ...] to {name: [status, CPU
seconds, output]}.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120


def main() -> None:
    """Run everything, in its order."""
    sys.path.insert(0, str(REPO))
    import torch  # these take seconds to load

    # torch.optim asks for the compiler's first part, DeepSpeed for the last of these when an engine is built.
    engine = ("torch._dynamo", "deepspeed.module_inject.auto_ep_layer")
    for name in ("deepspeed", "transformers", "datasets", "matplotlib.pyplot", *engine):
        import_module(name)

    torch.set_num_threads(1)
    gc.freeze()  # no collection of a child looks at all this, which would copy its memory
    results = {}
    for name, words, is_small, variables in json.loads(Path(sys.argv[1]).read_text()):
        output = Path("output.txt")
        child = os.fork()
        if child == 0:
            os.environ.update(variable.split("=", 1) for variable in variables)
            _become(words, output, is_small)
        status, seconds = _wait(child)
        results[name] = [status, round(seconds, 2), output.read_text(errors="replace")[-3000:]]
        Path(sys.argv[2]).write_text(json.dumps(results))


def _wait(child: int) -> tuple[int, float]:
    """Exit status of a child, negative where a signal ended it, and its CPU time."""
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.01)


def _become(words: list[str], output: Path, is_small: bool) -> None:
    """The child: the program, with what it prints in a file, and its exit status."""
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if is_small:
            _shrink_presets()
        if words[0] == "python-block":
            exec(compile(words[1], "block", "exec"), {"__name__": "__main__"})
            status = 0
        elif words[0] == "python":
            sys.argv = words[1:]
            sys.path.insert(0, str(Path(words[1]).resolve().parent))
            runpy.run_path(words[1], run_name="__main__")
            status = 0
        else:
            os.execvp(words[0], words)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _shrink_presets() -> None:
    """Every listed size is one layer of 32 channels."""
    from megatron.config import shape

    for name in shape.PRESETS:
        shape.PRESETS[name] = shape.Preset(32, 16, 2, 1)


if __name__ == "__main__":
    main()
