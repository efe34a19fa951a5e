"""One run at a time in a run directory: the file ``run.lock`` names its owner.

Only one process can create the file (O_EXCL, on NFS as well). It holds the owner's host, process
and job. A living owner touches it every few seconds, so no kernel lock is needed. An owner is dead

* if its process is gone, where it could be seen (same machine and process namespace);
* if it is an earlier attempt of the same Slurm job, queued again;
* otherwise, if it has not touched the file for `DEAD_AFTER_S`, by its disk's clock.

To take over a dead owner's lock a run creates ``run.lock.after-ITS-TOKEN``, which again only one
can, and renames it to ``run.lock``. So exactly one of many runs gets it, even if others are killed
on the way.
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
#: Seconds without a touch after which an owner that cannot be seen counts as dead. Many times
#: BEAT_S, because its machine may be busy and a disk slow.
DEAD_AFTER_S = 60.0


@dataclass(frozen=True)
class Owner:
    """The owner of a run directory. Fields of an unreadable lock are empty."""

    token: str  #: unique to this process and call
    host: str = ""
    pid: int = 0
    started: str = ""  #: start of the process in ticks since boot: process ids are used again
    boot: str = ""  #: of the kernel
    namespace: str = ""  #: namespace of process ids: a container's, or the machine's
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

    def __init__(
        self,
        run_dir: Path,
        note: Callable[[str], None] = lambda text: None,
        key: str = "run_dir",
    ) -> None:
        """run_dir: created if missing. note: shows a person what the run waits for. key: the name
        of the directory in messages.
        """
        self._run_dir, self._note, self._name = run_dir, note, f"{key} {run_dir}"
        self._key = key
        self._path = run_dir / LOCK_FILE
        self._me = this_process()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the directory, from a dead owner if there is one.

        Raises:
            UserError: a living run has it, or the directory cannot be written.
        """
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
            for left in self._run_dir.glob(
                f"{LOCK_FILE}.after-*"
            ):  # left by runs that were killed while taking over
                left.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self._name} cannot be written ({reason(error)}); expected a "
                f"directory with room, and the right to write there; make room, or set {self._key}"
            ) from error
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def confirm(self) -> None:
        """Check the ownership; call before writing what another run would write as well.

        Raises:
            RunFailed: another run has taken over the directory, because this one was stopped or cut
                off for longer than `DEAD_AFTER_S`.
        """
        with contextlib.suppress(OSError):  # an unreadable lock is not another run's
            owner = read_owner(self._path)
            if owner is None:  # deleted by hand, or with the directory
                self._run_dir.mkdir(parents=True, exist_ok=True)
                _make(self._path, self._me)
                owner = read_owner(self._path) or self._me
            if owner.token != self._me.token:
                raise RunFailed(
                    f"{self._name} was taken over by {owner} while this run gave no "
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
        """One attempt. True: the lock is ours; False: it changed meanwhile, try again."""
        if _make(self._path, self._me):
            return True
        first = read_owner(self._path)
        path, owner = self._path, first
        while first is not None and owner is not None:
            self._refuse_if_alive(path, owner)
            successor = self._run_dir / f"{LOCK_FILE}.after-{owner.token}"
            if _make(successor, self._me):
                now = read_owner(self._path)
                if now is None or now.token != first.token:  # another run was faster
                    successor.unlink(missing_ok=True)
                    return False
                os.replace(successor, self._path)
                self._note(f"{self._name} was left behind by {first}; taken over")
                return True
            path, owner = successor, read_owner(successor)
        return False

    def _refuse_if_alive(self, path: Path, owner: Owner) -> None:
        """Return once the owner is known to be dead, which may take DEAD_AFTER_S; refuse a living
        one.
        """
        silent = _silence(path)
        alive = _lives(owner, self._me)
        end = time.monotonic() + DEAD_AFTER_S - silent
        if alive is None and silent < DEAD_AFTER_S:
            self._note(
                f"{self._name} is held by {owner}, last heard of {silent:.0f} s ago; "
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
                f"{self._name} is in use by {owner}; expected one run at a time in a "
                f"run directory; wait for that one, stop it, or set another {self._key}"
            )

    def _beat(self) -> None:
        """Touch the lock until `release`; after a disk error try again."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                owner = read_owner(self._path)
                if owner is not None and owner.token == self._me.token:
                    touch(self._path)


def owner_in(run_dir: Path) -> Owner | None:
    """The owner of a directory, for those who only look; None: there is none, or it is dead. One
    that cannot be seen lives if it has touched its lock within `DEAD_AFTER_S`.
    """
    path = run_dir / LOCK_FILE
    try:
        owner = read_owner(path)
        alive = None if owner is None else _lives(owner, this_process())
        if owner is not None and alive is None:
            alive = _silence(path) < DEAD_AFTER_S
    except OSError:
        return None
    return owner if alive else None


def touch(path: Path) -> None:
    """Set the file's time to now, by the clock of its disk. Raises OSError."""
    os.utime(path)


def read_owner(path: Path) -> Owner | None:
    """The owner that a lock file names; None: there is no such file. An unreadable lock has an
    owner with empty fields.
    """
    try:
        content = read_bounded(path, _MOST_BYTES)  # opening makes NFS refresh the file
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
    """Create the file; False: it exists. OSError: it cannot be created; nothing is left behind."""
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
    """Whether the owner lives; None: only its touches can tell."""
    if owner.slurm_job and owner.slurm_job == me.slurm_job:
        if owner.slurm_restarts < me.slurm_restarts:
            return False  # Slurm queues a job again only after all of it has ended
    seen = owner.boot and (owner.boot, owner.namespace) == (me.boot, me.namespace)
    if seen and owner.pid > 0 and owner.started:
        start = _start_of(owner.pid)
        if start is not None or not _exists(owner.pid):
            return start == owner.started
    return None


def _silence(path: Path) -> float:
    """Seconds since the lock was touched, by the clock of its disk; 0 for a lock that is gone."""
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
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NFS refreshes
    except FileNotFoundError:
        return None
    try:
        return os.fstat(opened).st_mtime
    finally:
        os.close(opened)


def _start_of(pid: int) -> str | None:
    """Start of a process in ticks since boot; "" for a zombie; None: there is none, or it is
    hidden.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # after the name, which may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Whether a process exists, also if /proc hides the processes of other users."""
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
