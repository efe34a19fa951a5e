"""Checkpoints that cannot be written or are not what was written, in runs of two ranks."""

import contextlib
import resource
import shutil

import pytest

from tests.support.runs import reproducible, run


@pytest.fixture
def copy(folder, rl_run):
    """A copy of the finished run (8 steps, checkpoints of steps 4 and 8) to do harm to."""
    target = folder / "runs" / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "runs" / "rl", target)
    return target


def flip_a_bit(checkpoint):
    shard = max((checkpoint / "shards").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def cut_off(checkpoint):
    shard = checkpoint / "random" / "rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    return shard


@contextlib.contextmanager
def largest_file(size):
    """In the block no process that is started can write a larger file, bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(folder, *words):
    command = ["train", "rl.yaml", "--run_dir", "runs/copy", *words]
    return run(*command, cwd=folder, ranks=2, warm=True)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_undamaged(folder, copy):
    shard = flip_a_bit(copy / "checkpoints" / "step_8")
    damaged, shard = shard.read_bytes(), shard.relative_to(folder)
    done = train(folder)
    assert done.code == 0, done.err
    assert f"left out runs/copy/checkpoints/step_8: {shard} has SHA-256 " in done.err + done.out
    assert "continuing from runs/copy/checkpoints/step_4 (step 4)" in done.out
    assert reproducible(copy) == reproducible(folder / "runs" / "rl")
    assert (folder / shard).read_bytes() != damaged  # step 8 has been saved again


def test_the_newest_or_none(folder, copy):
    file = cut_off(copy / "checkpoints" / "step_8").relative_to(folder)
    done = train(folder, "--checkpoint.resume", "newest")
    assert done.ranks == (2, 2)
    assert len(done.errors) == 1 and done.errors[0].startswith(f"megatron-rl: error: {file} has ")
    assert (copy / "checkpoints" / "step_8").is_dir()


def test_when_all_are_damaged_the_newest_is_named_and_nothing_is_lost(folder, copy):
    checkpoints = copy / "checkpoints"
    file = cut_off(checkpoints / "step_8").relative_to(folder)
    flip_a_bit(checkpoints / "step_4")
    before = sorted(checkpoints.rglob("*"))
    done = train(folder)
    (error,) = done.errors
    assert f"all 2 checkpoints in runs/copy/checkpoints are damaged, the newest: {file} h" in error
    assert done.ranks == (2, 2)
    assert sorted(checkpoints.rglob("*")) == before


def test_a_run_outlives_a_checkpoint_that_cannot_be_written(folder, copy):
    checkpoints = copy / "checkpoints"
    for name in ("step_4", "step_8", "latest"):
        (shutil.rmtree if name != "latest" else lambda path: path.unlink())(checkpoints / name)
    with largest_file(1 << 16):  # shards are larger, as on a disk that is nearly full
        done = train(folder, "--evaluate.every", "0")
    assert "the checkpoint of step 4 could not be written (" in done.err + done.out
    assert "there is none; next try after step 8" in done.err + done.out
    assert "step 8/8" in done.out
    (error,) = done.errors
    assert error.startswith("megatron-rl: error: the checkpoint of step 8 could not be written")
    assert done.ranks == (1, 1)
    assert list(checkpoints.iterdir()) == []
