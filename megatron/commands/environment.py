"""What of a machine holds up a training run, one line each: ``ok``, or ``fix`` with what to do. Nothing is changed."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

GIB = 2**30
LEAST_FILES, LEAST_DISK, LEAST_SHARED = 4096, 20 * GIB, 1 * GIB
CLOCK_SECONDS, HUB_SECONDS = 5.0, 3.0


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and what to do about it ("": nothing)."""

    what: str
    found: str
    fix: str = ""


def lines() -> Iterator[str]:
    """Every finding as a line."""
    for check in CHECKS:
        finding = check()
        state = "ok" if not finding.fix else f"fix: {finding.fix}"
        yield f"  {finding.what:<16} {finding.found}  {state}"


def driver() -> Finding:
    """The NVIDIA driver, if there is one, and whether torch can use it."""
    import torch

    if shutil.which("nvidia-smi") is None:
        return Finding("driver", "none: runs use the CPU")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        answer = []
    if not answer:
        return Finding("driver", "nvidia-smi does not answer", "load the driver, or restart the machine")
    if not torch.cuda.is_available():
        wheel = f"torch {torch.__version__} is built for {torch.version.cuda or 'the CPU'}"
        return Finding("driver", f"{answer[0]}; {wheel}", "install a torch wheel for this driver (bash install.sh)")
    return Finding("driver", f"{answer[0]}, CUDA {torch.version.cuda}")


def gpus() -> Finding:
    """The GPUs that this process sees."""
    import torch

    from megatron.model.arithmetic import peak_flops

    if not torch.cuda.is_available():
        return Finding("GPUs", "none")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = f"{len(names)} x {names[0]}"
    if len(set(names)) > 1:
        return Finding("GPUs", ", ".join(names), "the slowest sets the pace: choose equal ones by CUDA_VISIBLE_DEVICES")
    known = peak_flops(torch.device("cuda", 0)) is not None
    return Finding("GPUs", found if known else f"{found} (no known peak: no MFU is shown)")


def flash_attention() -> Finding:
    """Which values of ``--attention-backend`` this machine has beside its default."""
    from megatron.model.kernels import FLASH, flash_obstacle

    found = {backend: flash_obstacle(backend) or "there" for backend in FLASH}
    shown = next(iter(found.values())) if len(set(found.values())) == 1 else ""
    return Finding(
        "FlashAttention", f"{', '.join(found)}: {shown}" if shown else "; ".join(map(": ".join, found.items()))
    )


def nccl() -> Finding:
    """NCCL, as torch brings it."""
    import torch

    if not torch.cuda.is_available():
        return Finding("NCCL", "not needed: gloo on the CPU")
    return Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def versions() -> Finding:
    """What computes."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "deepspeed", "triton"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return Finding("versions", ", ".join(found))


def shared_memory() -> Finding:
    """/dev/shm, through which loaders and NCCL pass data."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("/dev/shm", "none", "mount a tmpfs there; loaders and NCCL need it")
    free = shutil.disk_usage(place).free
    fix = "docker run --ipc=host, or --shm-size=16g" if free < LEAST_SHARED else ""
    return Finding("/dev/shm", f"{free / GIB:.1f} GiB free", fix)


def files() -> Finding:
    """Open files that a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {hard if hard >= LEAST_FILES else 'is limited by the machine: ask for more'}"
    return Finding("open files", f"{soft} (at most {hard})", fix if soft < LEAST_FILES else "")


def locked_memory() -> Finding:
    """Memory that may be pinned, which InfiniBand needs."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    has_network = Path("/sys/class/infiniband").is_dir()
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.0f} MiB"
    is_low = has_network and limit != resource.RLIM_INFINITY
    return Finding("locked memory", shown, "ulimit -l unlimited: InfiniBand is here" if is_low else "")


def processes() -> Finding:
    """Processes and threads that a user may have."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    shown = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    return Finding("processes", shown, "ulimit -u 16384" if 0 < limit < LEAST_FILES else "")


def cores() -> Finding:
    """Cores that this process may use, of those that are there."""
    own, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    is_bound = own < all_cores / 2
    fix = "srun --cpus-per-task, or taskset: loaders share these cores" if is_bound else ""
    return Finding("cores", f"{own} of {all_cores}", fix)


def memory() -> Finding:
    """Host memory, and the limit that a container sets."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(rows["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    bound = f", {int(text) / GIB:.0f} GiB allowed" if text.isdecimal() else ""
    return Finding("memory", f"{available / GIB:.0f} GiB available{bound}")


def clock() -> Finding:
    """This clock against that of the file system: files of a run are told apart by their times."""
    with tempfile.NamedTemporaryFile(dir=_writable(), prefix=".doctor.") as file:
        file.write(b"x")
        file.flush()
        away = os.stat(file.name).st_mtime - time.time()
    fix = "synchronise the clocks (chrony, ntp)" if abs(away) > CLOCK_SECONDS else ""
    return Finding("clock", f"{abs(away):.1f} s from the file system's", fix)


def disk() -> Finding:
    """Room and speed of the disk that runs are written to by default."""
    place = _writable()
    free = shutil.disk_usage(place).free
    block, count = os.urandom(2**20), 32
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor.") as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = count * 2**20 / (time.perf_counter() - started)
    fix = "free space, or name another place by --save" if free < LEAST_DISK else ""
    return Finding("disk", f"{free / GIB:.0f} GiB free, writes {speed / 1e6:.0f} MB/s ({place})", fix)


def _writable() -> Path:
    """The working directory, or the temporary one where nothing can be written to it."""
    here = Path.cwd()
    return here if os.access(here, os.W_OK) else Path(tempfile.gettempdir())


def host() -> Finding:
    """The name of this machine, by which ranks find each other."""
    name = socket.gethostname()
    try:
        return Finding("host", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        return Finding("host", f"{name} has no address", "add it to /etc/hosts, or name MASTER_ADDR by its address")


def hub() -> Finding:
    """Whether downloads can work."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding("hub", "offline by HF_HUB_OFFLINE")
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        return Finding("hub", "huggingface_hub is not installed", "bash install.sh")
    try:
        with urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            return Finding("hub", f"{ENDPOINT} answers")
    except urllib.error.HTTPError:
        return Finding("hub", f"{ENDPOINT} answers")
    except (OSError, ValueError):
        fix = "downloads need it: a proxy (HTTPS_PROXY), a mirror (HF_ENDPOINT), or files from elsewhere and HF_HUB_OFFLINE=1"
        return Finding("hub", f"{ENDPOINT} does not answer", fix)


CHECKS: tuple[Callable[[], Finding], ...] = (
    *(versions, driver, gpus, flash_attention, nccl, shared_memory, files, locked_memory),
    *(processes, cores, memory, clock, disk, host, hub),
)
