"""A SLURM of two nodes on this host, in one folder: its own munge, controller and slurmds, ended with what uses them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", os.environ["PATH"]))

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MinJobAge=86400
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores} RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that a SLURM of one's own needs and this machine lacks (Debian: slurm-wlm, munge)."""
    return [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SBIN) is None]


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, as root; yields the variables that its commands need, and stops every daemon at the end."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    text = CONFIG.format(
        folder=folder, host=socket.gethostname(), user="root", ports=_free_ports(3), cores=os.cpu_count()
    )
    (folder / "slurm.conf").write_text(text)
    environment = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"), PATH=SBIN)
    places = [
        f"--{name.replace('_', '-')}={folder / f'munge.{name}'}"
        for name in ("socket", "pid_file", "log_file", "seed_file")
    ]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={folder / 'munge.key'}", *places],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    daemons = []
    try:
        with open(folder / "daemons.log", "ab") as log:
            for command in commands:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                )
                time.sleep(1)
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True, timeout=30, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=environment, capture_output=True, text=True, timeout=30
        )
        if sorted(done.stdout.split("\n")) == ["", "n1 idle", "n2 idle"]:
            return
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < end, f"{done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.5)
