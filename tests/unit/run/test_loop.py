"""A run that is stopped, or whose disk is full for a while, ends like one that never was."""

import os
import subprocess
from types import SimpleNamespace

import pytest

from megatron_rl.errors import UserError
from tests.support.ranks import run_on_ranks
from tests.support.runs import records, reproducible
from tests.support.tiny import cpu_device
from tests.support.whole_runs import checkpoints, run_config, run_here, terminate
from tests.unit.observe.test_writers import _fill

#: Tokens of a batch after which a signal has been heard; without it a batch has 23.
HEARD_WITHIN = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole")
    complete, tokens = run_here(run_config(run_dir))
    assert complete and tokens > 2 * HEARD_WITHIN  # a batch is long enough for it to be seen
    assert [("eval/pass@1" in record) for record in reproducible(run_dir)] == [1, 0, 1, 0, 1]
    return run_dir


#: batch that the signal comes in -> (what is said, checkpoints, step of the last record)
STOPS = {
    2: ("stopped after step 0; run the same command to continue", [], None),
    5: ("stopped after step 1; run the same command to continue", ["step_1"], 1),
    6: ("stopped after step 2; run the same command to continue", ["step_2"], 2),
    8: ("stopped after step 2; run the same command to continue", ["step_2"], 2),
    12: ("stopped after step 4; run the same command to continue", ["step_4"], 4),
}


@pytest.mark.parametrize("batch", STOPS)
def test_a_signal_is_heard_in_a_rollout_and_in_an_evaluation(tmp_path, whole, capsys, batch):
    said, there, last = STOPS[batch]
    complete, tokens = run_here(run_config(tmp_path), {batch: terminate})
    assert not complete and tokens <= HEARD_WITHIN
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert checkpoints(tmp_path) == there
    written = reproducible(tmp_path)
    assert [record["step"] for record in written] == list(range(0 if last is None else last + 1))
    # Of the evaluation that was given up nothing is recorded.
    names = {name.partition("/")[0] for record in written[-1:] for name in record}
    measured = {name for record in records(tmp_path / "metrics.jsonl")[-1:] for name in record}
    if batch != 5:
        assert "eval" not in names and "time/eval_s" not in measured
    complete, _ = run_here(run_config(tmp_path))
    assert complete
    assert reproducible(tmp_path) == reproducible(whole)
    samples = (whole / "samples.jsonl").read_text()
    assert (tmp_path / "samples.jsonl").read_text() == samples
    assert checkpoints(tmp_path)[-1] == "step_4"
    capsys.readouterr()
    run_here(run_config(tmp_path))  # and now there is nothing owed
    assert "all 4 steps are done, nothing left to do" in capsys.readouterr().out


def test_the_best_checkpoint_is_known_after_an_evaluation_was_made_up_for(tmp_path):
    from megatron_rl.checkpoint.directory import score_of

    config = run_config(tmp_path, checkpoint={"keep_best": 1, "best_metric": "eval/pass@1"})
    run_here(config, {7: terminate})
    assert score_of(tmp_path / "checkpoints" / "step_2") is None
    run_here(config, {4: terminate})  # the first batch after those of the evaluation
    score = score_of(tmp_path / "checkpoints" / "step_2")
    assert score == reproducible(tmp_path)[2]["eval/pass@1"]


def _stopped_on_one_rank(run_dir, parallel):
    import torch.distributed as dist

    signals = {2: terminate} if dist.get_rank() == 1 else {}
    config = run_config(run_dir, parallel=parallel, rollout={"max_batch": 2})
    return run_here(config, signals)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {}], ids=str)
def test_one_rank_is_asked_and_all_stop_at_the_same_token(tmp_path, parallel):
    """In the first evaluation. Ranks that generate alone hear of it through the store, and give up
    the evaluation as well, whatever they have of it. So do expert-parallel ones, each of which has
    copies of all experts.
    """
    stopped = run_on_ranks(2, _stopped_on_one_rank, tmp_path, parallel)
    assert [complete for complete, _ in stopped] == [False, False]
    assert stopped[1][1] <= HEARD_WITHIN
    if parallel.keys() & {"tensor", "pipeline"}:
        assert stopped[0][1] == stopped[1][1]
    assert records(tmp_path / "metrics.jsonl") == []


def test_a_disk_that_is_full_for_a_step_costs_its_checkpoint_only(tmp_path, whole, capsys):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "megatron_rl_test", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        run_dir = tmp_path / "run"
        happens = {1: lambda: _fill(tmp_path, 0), 9: lambda: (tmp_path / "filler").unlink()}
        config = run_config(run_dir, checkpoint={"every": 1})
        assert run_here(config, happens)[0]
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" (")[0].removeprefix("warning: ") for line in lines] == [
            f"{run_dir}/metrics.jsonl could not be written",
            f"{run_dir}/samples.jsonl could not be written",
            "the checkpoint of step 1 could not be written",
            "the checkpoint of step 2 could not be written",
            f"{run_dir}/metrics.jsonl is written again",
            f"{run_dir}/samples.jsonl is written again",
        ]
        assert reproducible(run_dir) == reproducible(whole)
        samples = (whole / "samples.jsonl").read_text()
        assert (run_dir / "samples.jsonl").read_text() == samples
        assert checkpoints(run_dir) == ["step_3", "step_4"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_file_of_the_run_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "configs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="run_dir .* could not be written .File exists: ") as told:
        run_here(run_config(tmp_path))
    assert "\n" not in str(told.value) and "make room, or set run_dir" in str(told.value)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_what_is_read_only_in_a_run_is_said_before_its_model_is_built(tmp_path, name, monkeypatch):
    from megatron_rl.run import session

    place = tmp_path / name
    place.write_text("") if "." in name else place.mkdir()
    access = os.access  # root may write everything
    refused = {place: False}
    monkeypatch.setattr(os, "access", lambda path, mode: refused.get(path, access(path, mode)))
    with pytest.raises(UserError) as told:
        session._check_writable(run_config(tmp_path))
    assert str(told.value) == (
        f"{place} is read-only; expected to add to it; give the right to write there, "
        "or set run_dir"
    )
    session._check_writable(run_config(tmp_path, checkpoint={"resume": "never"}))
    refused.clear()
    session._check_writable(run_config(tmp_path))


def test_a_page_that_cannot_be_written_does_not_fail_the_run(tmp_path, capsys):
    cpu_device()
    from megatron_rl.observe.console import Console
    from megatron_rl.run.verbs import _report

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "report.html" / "inside").mkdir(parents=True)
    _report(SimpleNamespace(run_dir=tmp_path, console=Console("plain", "train")), complete=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("warning: no report: the report could not be written (Is a direc")
    assert told.err.endswith(
        "; expected room on the disk and the right to write there; make room and run: "
        f"megatron-rl report {tmp_path}\n"
    )
