"""One run at a time in a run directory: who is refused, who is taken over, and by how many."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_rl.errors import RunFailed, UserError
from megatron_rl.run import run_lock
from megatron_rl.run.run_lock import LOCK_FILE, Owner, RunLock, owner_in, read_owner, this_process


@pytest.fixture
def owner():
    """A process that lives until it is killed, as the owner of a lock."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = this_process()
    started = run_lock._start_of(child.pid)
    found = dataclasses.replace(me, token="a" * 32, pid=child.pid, started=started)
    yield child, found
    child.kill()
    child.wait()


@pytest.fixture
def quick(monkeypatch):
    """The same times, shorter."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "DEAD_AFTER_S", 1.0)


def elsewhere(owner, **fields):
    """The same on a machine whose processes cannot be seen from here."""
    fields = {"host": "node-7", "boot": "another", **fields}
    return dataclasses.replace(owner, **fields)


def lay(run_dir, owner, silent=0.0):
    """The lock of an owner that touched it last so many seconds ago."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / LOCK_FILE
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(path, (time.time() - silent,) * 2)


def take(run_dir):
    """Take and give back; what is said."""
    said = []
    lock = RunLock(run_dir, said.append)
    lock.acquire()
    assert read_owner(run_dir / LOCK_FILE).pid == os.getpid()
    lock.release()
    assert list(run_dir.iterdir()) == []
    return said


def refused(run_dir):
    before = (run_dir / LOCK_FILE).read_bytes()
    with pytest.raises(UserError) as caught:
        RunLock(run_dir).acquire()
    assert (run_dir / LOCK_FILE).read_bytes() == before
    assert sorted(path.name for path in run_dir.iterdir()) == [LOCK_FILE]
    return str(caught.value)


def test_a_free_directory_is_made_taken_and_given_back(tmp_path):
    assert take(tmp_path / "new" / "run") == []


def test_a_living_process_is_refused_by_name_at_once(tmp_path, owner):
    child, found = owner
    lay(tmp_path, dataclasses.replace(found, slurm_job="77"), silent=10_000)  # a busy disk
    text = refused(tmp_path)
    assert text == (
        f"run_dir {tmp_path} is in use by process {child.pid} on {found.host} since {found.since}, "
        "Slurm job 77; expected one run at a time in a run directory; wait for that one, stop it, "
        "or set another run_dir"
    )


def test_a_killed_process_is_taken_over_at_once(tmp_path, owner):
    child, found = owner
    lay(tmp_path, found)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # still there, as a zombie
    assert take(tmp_path) == [f"run_dir {tmp_path} was left behind by {found}; taken over"]
    child.wait()
    lay(tmp_path, found)
    assert len(take(tmp_path)) == 1


def test_a_process_number_given_to_another_process_is_not_the_owner(tmp_path, owner):
    _, found = owner
    lay(tmp_path, dataclasses.replace(found, started="1"))
    assert len(take(tmp_path)) == 1


def test_a_silent_owner_elsewhere_is_taken_over_without_waiting(tmp_path, owner):
    lay(tmp_path, elsewhere(owner[1]), silent=run_lock.DEAD_AFTER_S + 5)
    assert len(take(tmp_path)) == 1


def test_an_owner_in_another_container_is_not_looked_for_here(tmp_path, owner):
    """The same kernel with other process numbers: a number that is no process here says nothing."""
    found = dataclasses.replace(owner[1], namespace="pid:[1]", pid=2**22 + 1)
    assert run_lock._lives(found, this_process()) is None
    lay(tmp_path, found, silent=run_lock.DEAD_AFTER_S + 5)
    assert len(take(tmp_path)) == 1


def test_an_owner_elsewhere_that_touches_its_lock_is_refused(tmp_path, owner, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_AFTER_S", 60.0)  # it ends with the first touch
    lay(tmp_path, elsewhere(owner[1]))
    ended = threading.Event()

    def live():
        while not ended.wait(0.1):
            run_lock.touch(tmp_path / LOCK_FILE)

    beating = threading.Thread(target=live)
    beating.start()
    try:
        assert f"is in use by process {owner[1].pid} on node-7 since" in refused(tmp_path)
    finally:
        ended.set()
        beating.join()


def test_one_that_falls_silent_is_waited_for_and_taken_over(tmp_path, owner, quick):
    lay(tmp_path, elsewhere(owner[1]))
    said = take(tmp_path)
    assert "on node-7 since" in said[0] and "waiting up to" in said[0] and len(said) == 2


def test_a_slurm_job_that_is_queued_again_takes_over_from_itself(tmp_path, owner, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lay(tmp_path, elsewhere(owner[1], slurm_job="77"))
    assert len(take(tmp_path)) == 1
    for job, restarts in (("78", 0), ("77", 1)):  # another job, and another step of this attempt
        found = elsewhere(owner[1], slurm_job=job, slurm_restarts=restarts)
        assert run_lock._lives(found, this_process()) is None


@pytest.mark.parametrize(
    "content",
    [
        b'{"token": "' + b"a" * 32 + b'", "pid": ' + b"9" * 5000 + b"}",
        b'{"pid": NaN}',
        b"",
        b"{",
        b"[" * 9000,
        b'{"token": "../../x"}',
        b'{"token": 3}',
        b"\xff",
    ],
)
def test_a_lock_that_cannot_be_read_is_held_for_as_long_as_it_is_touched(tmp_path, content):
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    assert read_owner(path).pid == 0
    assert run_lock._lives(read_owner(path), this_process()) is None
    os.utime(path, (1, 1))
    assert take(tmp_path) == [
        f"run_dir {tmp_path} was left behind by an owner unknown (run.lock cannot be read); "
        "taken over"
    ]


@pytest.mark.parametrize("what", ["pipe", "loop", "directory"])
def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path, what):
    path = tmp_path / LOCK_FILE
    if what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=f"run_dir {tmp_path} cannot be written .*; expected a dir"):
        take(tmp_path)


def test_a_restart_count_that_is_no_number_counts_as_none(monkeypatch):
    for text in ("9" * 5000, "\u0663", "x", ""):
        monkeypatch.setenv("SLURM_RESTART_COUNT", text)
        assert this_process().slurm_restarts == 0


def test_of_many_that_come_at_once_one_gets_it(tmp_path, owner):
    """From a dead owner, whose successor was killed while it took over."""
    child, found = owner
    child.kill()
    child.wait()
    for _ in range(20):
        lay(tmp_path, found)
        half = dataclasses.replace(found, token="b" * 32)
        (tmp_path / f"{LOCK_FILE}.after-{found.token}").write_text(
            json.dumps(dataclasses.asdict(half))
        )
        locks = [RunLock(tmp_path) for _ in range(8)]
        gate, got = threading.Barrier(8), []

        def come(lock, gate=gate, got=got):
            gate.wait()
            try:
                lock.acquire()
            except UserError:
                return
            got.append(lock)

        threads = [threading.Thread(target=come, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].confirm()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        got[0].release()


def test_the_lock_is_touched_and_outlives_being_deleted(tmp_path, quick):
    lock = RunLock(tmp_path)
    lock.acquire()
    path = tmp_path / LOCK_FILE
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 60
    while path.stat().st_mtime < 100 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > 100
    path.unlink()
    lock.confirm()
    assert read_owner(path).pid == os.getpid()
    lock.release()
    assert not path.exists()


def test_one_that_was_taken_over_writes_nothing_more(tmp_path, owner):
    lock = RunLock(tmp_path)
    lock.acquire()
    lay(tmp_path, elsewhere(owner[1]))
    with pytest.raises(RunFailed, match="was taken over by process .* on node-7"):
        lock.confirm()
    lock.release()
    assert read_owner(tmp_path / LOCK_FILE).token == owner[1].token


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run"])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir .* cannot be written .*; expected .*; make room"):
        RunLock(tmp_path / place).acquire()


def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "megatron_rl_test", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        (tmp_path / "filler").write_bytes(bytes(64 * 1024))
        with pytest.raises(UserError, match="No space left on device"):
            RunLock(tmp_path).acquire()
        assert [path.name for path in tmp_path.iterdir()] == ["filler"]
        (tmp_path / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            RunLock(tmp_path).acquire()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_an_owner_says_who_it_is(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    me = this_process()
    assert (me.pid, me.torchrun_id) == (os.getpid(), "abc") and str(me).endswith("torchrun id abc")
    assert run_lock._lives(me, this_process()) is True
    assert str(Owner("x")) == "an owner unknown (run.lock cannot be read)"


def test_those_who_only_look_see_a_living_owner(tmp_path, owner, quick):
    child, found = owner
    assert owner_in(tmp_path) is None and owner_in(tmp_path / "none") is None
    lay(tmp_path, found, silent=100.0)  # it is seen to live, however long it was silent
    assert owner_in(tmp_path) == found
    child.kill()
    child.wait()
    assert owner_in(tmp_path) is None
    far = elsewhere(found)
    lay(tmp_path, far)
    assert owner_in(tmp_path) == far
    lay(tmp_path, far, silent=5.0)
    assert owner_in(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE}


def test_messages_name_the_directory_by_its_key(tmp_path, owner):
    _, found = owner
    lay(tmp_path, found)
    with pytest.raises(UserError, match=f"^study_dir {tmp_path} is in use .* another study_dir$"):
        RunLock(tmp_path, key="study_dir").acquire()
