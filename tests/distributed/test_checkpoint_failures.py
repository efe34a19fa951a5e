"""A rank that cannot write its part of a checkpoint, and the others; a disk that is full."""

import errno
import os
import subprocess
from unittest import mock

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config


def _save(root, failing, in_background):
    """On a rank: save step 1; then step 2, of which rank 1 cannot write ``failing``."""
    cpu_device()
    import torch.distributed as dist

    from megatron_rl.checkpoint import save as saving
    from megatron_rl.checkpoint.directory import newest_checkpoint
    from tests.support.tiny_training import build_training
    from tests.unit.checkpoint.test_save_load import load, save

    training = build_training(tiny_config())
    write = writer(save, training, root, in_background)
    write(1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch = mock.patch.object(saving, failing, full) if dist.get_rank() == 1 else mock.MagicMock()
    with patch, pytest.raises(OSError, match="No space left on device"):
        write(2)
    dist.barrier()
    names = sorted(path.name for path in root.iterdir())
    load(training, newest_checkpoint(root))
    write(3)
    return names


def writer(save, training, root, in_background):
    """What saves a step, at once or in a thread."""
    from megatron_rl.checkpoint.background import BackgroundWriter

    background = BackgroundWriter() if in_background else None

    def write(step):
        save(training, root, step, background=background)
        if background is not None:
            background.wait()

    return write


@pytest.mark.parametrize("failing", ["_own_fingerprints", "save_random_state"])
@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_all_ranks_give_up_together_and_the_old_one_is_intact(tmp_path, failing, in_background):
    names = run_on_ranks(2, _save, tmp_path, failing, in_background)
    assert names == [["latest", "step_1"]] * 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "megatron_rl_test", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def _save_on_a_full_disk(root, in_background):
    """On a rank: save with ever more room, until it is enough; the bytes that were left."""
    cpu_device()
    import torch.distributed as dist

    from megatron_rl.checkpoint.directory import newest_checkpoint
    from tests.support.tiny_training import build_training
    from tests.unit.checkpoint.test_save_load import load, save

    training = build_training(tiny_config())
    write = writer(save, training, root / "checkpoints", in_background)
    write(1)
    needed = sum(path.stat().st_blocks * 512 for path in (root / "checkpoints").rglob("*"))
    failed = []
    rooms = [0, 2**12, 2**14, 2**16, needed // 2, needed - 2**14, 2 * needed]
    for room in rooms:
        if dist.get_rank() == 0:
            fill(root, room)
        dist.barrier()
        try:
            write(2)
        except OSError as error:
            failed.append((room, str(error)))
        dist.barrier()
        names = sorted(path.name for path in (root / "checkpoints").iterdir())
        assert names == (["latest", "step_1"] if len(failed) > rooms.index(room) else names)
        dist.barrier()
    load(training, newest_checkpoint(root / "checkpoints"))
    return [room for room, _ in failed], needed, [text for _, text in failed]


def fill(root, room):
    """Leave so many bytes of the file system."""
    filler = root / "filler"
    filler.unlink(missing_ok=True)
    state = os.statvfs(root)
    filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - room)))


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in background"])
def test_a_full_disk_costs_the_new_checkpoint_only(small_disk, in_background):
    for failed, needed, texts in run_on_ranks(2, _save_on_a_full_disk, small_disk, in_background):
        assert failed == [0, 2**12, 2**14, 2**16, needed // 2, needed - 2**14]
        assert all("\n" not in text for text in texts), texts
    assert (small_disk / "checkpoints" / "latest").read_text() == "step_2\n"


def _interrupted_save(root):
    cpu_device()
    import signal

    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter

    from megatron_rl.parallel.stop_request import StopRequest
    from tests.support.tiny_training import build_training
    from tests.unit.checkpoint.test_save_load import save

    training, write = build_training(tiny_config()), FileSystemWriter.write_data

    def hurry(*args):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return write(*args)

    with StopRequest() as stop:
        stop.requested = True  # by a first Ctrl-C
        with mock.patch.object(FileSystemWriter, "write_data", hurry):
            with pytest.raises(KeyboardInterrupt):
                save(training, root, 1)
    return sorted(path.name for path in root.iterdir())


def test_a_second_ctrl_c_on_one_rank_ends_the_save_on_all(tmp_path):
    assert run_on_ranks(2, _interrupted_save, tmp_path) == [[".step_1.partial"]] * 2
