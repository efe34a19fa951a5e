"""A run that is killed, stopped and continued gives the numbers of one that never was."""

import re

import pytest

from tests.support.runs import records, reproducible

pytestmark = pytest.mark.slow


def test_the_same_seed_gives_the_same_numbers(folder, rl_run, interrupted):
    """The killed run, in a directory and processes of its own, up to where it was killed."""
    (folder / "killed").mkdir()
    (folder / "killed" / "metrics.jsonl").write_text(interrupted.metrics)
    (folder / "killed" / "samples.jsonl").write_text(interrupted.samples)
    killed, whole = reproducible(folder / "killed"), reproducible(folder / "runs" / "rl")
    assert len(killed) >= 6
    assert killed == whole[: len(killed)]
    samples = records(folder / "killed" / "samples.jsonl")
    assert samples == records(folder / "runs" / "rl" / "samples.jsonl")[: len(samples)]
    assert len(samples) >= 20


def test_a_killed_run_leaves_its_last_checkpoint(interrupted):
    assert interrupted.killed.code != 0
    assert interrupted.checkpoints_of_killed == {"step_4"}


def test_a_stopped_run_saves_the_step_it_reached(interrupted):
    out = interrupted.stopped.out
    assert "continuing from runs/broken/checkpoints/step_4 (step 4)" in out
    (step,) = re.findall(r"stopped after step (\d); run the same command to continue", out)
    assert interrupted.checkpoints_of_stopped == {"step_4", f"step_{step}"}
    assert f"continuing from runs/broken/checkpoints/step_{step} " in interrupted.finished.out
    assert "Traceback" not in interrupted.stopped.err.replace(_torchruns(interrupted), "")


def _torchruns(interrupted):
    """The traceback with which torchrun itself ends on a signal."""
    err = interrupted.stopped.err
    return err[err.index("Traceback") :] if "SignalException" in err else ""


def test_a_continued_run_ends_like_one_that_was_never_interrupted(folder, rl_run, interrupted):
    assert reproducible(interrupted.run_dir) == reproducible(folder / "runs" / "rl")
    for name in ("samples.jsonl",):
        whole = (folder / "runs" / "rl" / name).read_text()
        assert (interrupted.run_dir / name).read_text() == whole
    assert not list(interrupted.run_dir.glob("*.old-*"))


def test_a_finished_run_says_so_and_is_left_alone(interrupted):
    assert "all 8 steps are done, nothing left to do" in interrupted.rerun.out
    assert "step 8/8" not in interrupted.rerun.out
    assert interrupted.rerun.err == ""
    assert interrupted.files() == interrupted.files_of_finished
