"""A Slurm cluster of two nodes on this machine, with its own munge; it ends with the block."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator

#: What has to be installed: the Debian packages slurm-wlm and munge.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

#: Longest a job may take.
SECONDS = 420.0

_CONF = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (packages slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "slurmd has to run as root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to the cluster."""
    folder.mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname()
    conf.write_text(_CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [
        [*munge, f"--socket={folder}/munge.socket"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c", "-N", "n1"],
        ["slurmd", "-D", "-c", "-N", "n2"],
    ]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            log = stack.enter_context(open(folder / f"daemon_{number}.log", "w"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(_stop, daemon)
            time.sleep(0.5)
        _wait_for_nodes(environment)
        yield environment


def ask(environment: dict[str, str], *words: str) -> str:
    """The output of one of Slurm's commands."""
    return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout


def state(environment: dict[str, str], job: str) -> str:
    """A job's, such as RUNNING; of a task of an array: JOB_TASK."""
    shown = ask(environment, "scontrol", "show", "job", job)
    return shown.split("JobState=")[1].split()[0]


def wait_until(happened: Callable[[], bool], log: Path) -> None:
    """Wait until something has happened; AssertionError with the job's log if it takes too long."""
    end = time.monotonic() + SECONDS
    while not happened():
        text = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < end, text
        time.sleep(0.2)


def start_again(environment: dict[str, str], job: str, log: Path) -> None:
    """Start a requeued job at once; Slurm itself lets it wait for two minutes."""
    wait_until(lambda: state(environment, job) == "PENDING", log)
    time.sleep(3.0)  # a node refuses the job in the second in which it was taken from it
    ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


def _wait_for_nodes(environment: dict[str, str]) -> None:
    end = time.monotonic() + 60.0
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if ask(environment, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"]:
                return
        assert time.monotonic() < end, "the nodes do not come up"
        time.sleep(0.2)


def _stop(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(20.0)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            free = stack.enter_context(socket.socket())
            free.bind(("", 0))
            ports.append(free.getsockname()[1])
        return ports
