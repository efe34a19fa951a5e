"""One run at a time in a run directory: the file ``run.lock`` says whose it is.

A file that only one can make (O_EXCL, on NFS as well), with the owner's place and job in it. Who
lives touches it every few seconds; no lock of the kernel is needed. An owner is dead

* where its processes can be seen (same machine and process namespace): when the process is gone;
* when it is an earlier attempt of the same Slurm job, queued again;
* else when it has not touched the file for `DEAD_AFTER_S`, by the clock of the directory's disk.

A dead owner's lock is taken over by making ``run.lock.after-ITS-TOKEN``, which again only one can,
and renaming that to ``run.lock``; so of many that come at once exactly one gets it, whatever moment
another is killed at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.files import read_bounded, reason

LOCK_FILE = "run.lock"
_MOST_BYTES = 10_000
#: Seconds between two touches of the lock.
BEAT_S = 5.0
#: Seconds without a touch after which an owner that cannot be seen is taken for dead. Many times
#: BEAT_S: its machine may be busy, and a disk slow.
DEAD_AFTER_S = 60.0


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory. Fields of a lock that cannot be read are empty."""

    token: str  #: of this one process and call
    host: str = ""
    pid: int = 0
    started: str = ""  #: when the process did, in ticks since the machine did: pids come again
    boot: str = ""  #: of the kernel
    namespace: str = ""  #: of process numbers: that of a container, or the machine's
    since: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0
    torchrun_id: str = ""

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        run = f", torchrun id {self.torchrun_id}" if self.torchrun_id else ""
        if not self.pid:
            return f"an owner unknown ({LOCK_FILE} cannot be read)"
        return f"process {self.pid} on {self.host} since {self.since}{job}{run}"


def this_process() -> Owner:
    """The calling process."""
    environment = os.environ
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        boot=_boot(),
        namespace=_namespace(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        slurm_job=environment.get("SLURM_JOB_ID", ""),
        slurm_restarts=int(restarts) if re.fullmatch("[0-9]{1,9}", restarts) else 0,
        torchrun_id="" if run_id == "none" else run_id,
    )


class RunLock:
    """Holds a run directory from `acquire` to `release`."""

    def __init__(self, run_dir: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """run_dir: is made where it is missing. say: tells a person what is waited for."""
        self._run_dir, self._say = run_dir, say
        self._path = run_dir / LOCK_FILE
        self._me = this_process()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the directory, over from a dead owner if need be.

        Raises:
            UserError: a living run has it, or it cannot be written.
        """
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
            for left in self._run_dir.glob(f"{LOCK_FILE}.after-*"):  # of those killed on the way
                left.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"run_dir {self._run_dir} cannot be written ({reason(error)}); expected a "
                "directory with room, and the right to write there; make room, or set run_dir"
            ) from error
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def confirm(self) -> None:
        """Before something is written that another run would write as well.

        Raises:
            RunFailed: another run has taken the directory over, as happens to one that was stopped
                or cut off for longer than `DEAD_AFTER_S`.
        """
        with contextlib.suppress(OSError):  # what cannot be read now is no one else's
            owner = read_owner(self._path)
            if owner is None:  # deleted by hand, or with the directory
                self._run_dir.mkdir(parents=True, exist_ok=True)
                _make(self._path, self._me)
                owner = read_owner(self._path) or self._me
            if owner.token != self._me.token:
                raise RunFailed(
                    f"run_dir {self._run_dir} was taken over by {owner} while this run gave no "
                    "sign of life; nothing more is written; the other run goes on"
                )

    def release(self) -> None:
        """Give the directory back."""
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        with contextlib.suppress(OSError):
            owner = read_owner(self._path)
            if owner is not None and owner.token == self._me.token:
                self._path.unlink()

    def _try(self) -> bool:
        """One attempt: True: it is ours; False: things have changed meanwhile."""
        if _make(self._path, self._me):
            return True
        first = read_owner(self._path)
        path, owner = self._path, first
        while first is not None and owner is not None:
            self._refuse_if_alive(path, owner)
            successor = self._run_dir / f"{LOCK_FILE}.after-{owner.token}"
            if _make(successor, self._me):
                now = read_owner(self._path)
                if now is None or now.token != first.token:  # it was taken over before us
                    successor.unlink(missing_ok=True)
                    return False
                os.replace(successor, self._path)
                self._say(f"run_dir {self._run_dir} was left behind by {first}; taken over")
                return True
            path, owner = successor, read_owner(successor)
        return False

    def _refuse_if_alive(self, path: Path, owner: Owner) -> None:
        """Return once the owner is known to be dead; it may take DEAD_AFTER_S to see."""
        silent = _silence(path)
        alive = _lives(owner, self._me)
        end = time.monotonic() + DEAD_AFTER_S - silent
        if alive is None and silent < DEAD_AFTER_S:
            self._say(
                f"run_dir {self._run_dir} is held by {owner}, last heard of {silent:.0f} s ago; "
                f"waiting up to {DEAD_AFTER_S - silent:.0f} s to see whether it lives"
            )
        last = _touched(path)
        while alive is None and time.monotonic() < end:
            time.sleep(min(1.0, BEAT_S))
            now = _touched(path)
            alive = True if now is not None and now != last else None
            if now is None:  # given back
                return
        if alive:
            raise UserError(
                f"run_dir {self._run_dir} is in use by {owner}; expected one run at a time in a "
                "run directory; wait for that one, stop it, or set another run_dir"
            )

    def _beat(self) -> None:
        """Until `release`; a disk that fails for a while is tried again."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                owner = read_owner(self._path)
                if owner is not None and owner.token == self._me.token:
                    touch(self._path)


def touch(path: Path) -> None:
    """Say "alive": the file's time is now, by the clock of its disk. OSError: it cannot be."""
    os.utime(path)


def read_owner(path: Path) -> Owner | None:
    """Whose lock a file is; None: there is no such file. One that cannot be understood has an owner
    of whom nothing is known but the file's time.
    """
    try:
        content = read_bounded(path, _MOST_BYTES)  # to open is what makes NFS look again
        number = os.stat(path).st_ino
    except FileNotFoundError:
        return None
    try:
        fields = parse_json(content)
        known = {name: fields[name] for name in Owner.__dataclass_fields__ if name in fields}
        owner = Owner(**known)
        right = all(isinstance(getattr(owner, n), type(v)) for n, v in asdict(_ANYONE).items())
        if right and re.fullmatch("[0-9a-f]{32}", owner.token):  # it becomes part of a file's name
            return owner
    except (BadJson, TypeError):
        pass
    return Owner(token=f"unreadable-{number}-{len(content)}")


_ANYONE = Owner("")


def _make(path: Path, owner: Owner) -> bool:
    """Make the file; False: there is one. OSError: it cannot be made, and is not."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        content = json.dumps(asdict(owner), indent=1).encode()
        if os.write(file, content) < len(content):
            raise OSError(f"no room for {path}")
        os.fsync(file)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(file)
    return True


def _lives(owner: Owner, me: Owner) -> bool | None:
    """Whether it does; None: that can only be seen from its touches."""
    if owner.slurm_job and owner.slurm_job == me.slurm_job:
        if owner.slurm_restarts < me.slurm_restarts:
            return False  # Slurm queues a job again when all of it has ended
    seen = owner.boot and (owner.boot, owner.namespace) == (me.boot, me.namespace)
    if seen and owner.pid > 0 and owner.started:
        start = _start_of(owner.pid)
        if start is not None or not _exists(owner.pid):
            return start == owner.started
    return None


def _silence(path: Path) -> float:
    """Seconds since the lock was touched, both by the clock of the disk; 0 for one that is gone."""
    last = _touched(path)
    probe = path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}.tmp")
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        now = os.stat(probe).st_mtime
    finally:
        os.unlink(probe)
    return 0.0 if last is None else max(0.0, now - last)


def _touched(path: Path) -> float | None:
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NFS looks again
    except FileNotFoundError:
        return None
    try:
        return os.fstat(opened).st_mtime
    finally:
        os.close(opened)


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did, "" for one that has ended and is a
    zombie; None: there is none, or it is hidden.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Also where /proc hides the processes of others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
