"""The files of a run: strict JSON, one object a step, and resuming as if nothing had happened."""

import errno
import json
import math
import os
import subprocess
import sys
import types

import pytest

from megatron_rl.config.loggers import chosen_loggers
from megatron_rl.config.schema_observe import ObserveConfig
from megatron_rl.errors import UserError
from megatron_rl.observe.append_file import AppendFile
from megatron_rl.observe.run_files import drop_after, last_evaluated, read_jsonl, to_json_line
from megatron_rl.observe.writers import RunWriter


def _open(run_dir, resume_step=None, tensorboard=False, wandb=None, said=None):
    warn = [].append if said is None else said.append
    loggers = chosen_loggers(ObserveConfig(tensorboard=tensorboard, wandb=wandb))
    return RunWriter(run_dir, loggers=loggers, resume_step=resume_step, warn=warn)


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def _lines(path):
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def test_lines_are_flushed_and_strict_json(tmp_path):
    with _open(tmp_path / "new" / "run") as writer:
        writer.write_metrics(0, {"eval/pass@1": 0.25})
        writer.write_metrics(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
        writer.write_samples(1, [{"prompt": "Größe\n2", "reward": -math.inf, "parts": [math.nan]}])
        assert _lines(tmp_path / "new/run/metrics.jsonl") == [
            {"step": 0, "eval/pass@1": 0.25},
            {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4},
        ]
        assert _lines(tmp_path / "new/run/samples.jsonl") == [
            {"step": 1, "prompt": "Größe\n2", "reward": None, "parts": [None]}
        ]


def test_names_of_older_versions_are_written_beside_those_of_today(tmp_path):
    with _open(tmp_path) as writer:
        writer.write_metrics(1, {"router/raw_gamma_mean": 0.75, "router/raw_gamma_min": math.nan})
        writer.add_to_last(1, {"router/raw_gamma_mean/layer_03": 0.5, "rollout/staleness": 2.0}, [])
        with pytest.raises(ValueError, match="unknown metric 'router/shift_mean'"):
            writer.write_metrics(2, {"router/shift_mean": 0.75})
    assert _lines(tmp_path / "metrics.jsonl") == [
        {
            "step": 1,
            "router/raw_gamma_mean": 0.75,
            "router/shift_mean": 0.75,
            "router/raw_gamma_min": None,
            "router/shift_min": None,
            "router/raw_gamma_mean/layer_03": 0.5,
            "router/shift_mean/layer_03": 0.5,
            "rollout/staleness": 2.0,
            "rollout/lag": 2.0,
        }
    ]


def test_one_record_a_step_and_known_names(tmp_path):
    with _open(tmp_path) as writer:
        writer.write_metrics(3, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 3 after step 3"):
            writer.write_metrics(3, {"loss": 1.0})
        with pytest.raises(ValueError, match="losss"):
            writer.write_metrics(4, {"losss": 1.0})
    assert len(_lines(tmp_path / "metrics.jsonl")) == 1


def test_resume_drops_later_records_and_a_torn_line(tmp_path):
    with _open(tmp_path) as writer:
        for step in range(1, 6):
            writer.write_metrics(step, {"loss": float(step)})
            writer.write_samples(step, [{"completion": f"{step}a"}, {"completion": f"{step}b"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write('{"step": 2, "loss": 9, "text": "ö'.encode()[:-1])  # cut inside a character
    with _open(tmp_path, resume_step=3) as writer:
        with pytest.raises(ValueError, match="after step 3"):
            writer.write_metrics(3, {"loss": 0.0})
        writer.write_metrics(4, {"loss": 40.0})
        writer.write_samples(4, [{"completion": "again"}])
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0},
        {"step": 4, "loss": 40.0},
    ]
    samples = [(line["step"], line["completion"]) for line in _lines(tmp_path / "samples.jsonl")]
    assert samples[-3:] == [(3, "3a"), (3, "3b"), (4, "again")] and len(samples) == 7
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_keeps_a_complete_last_line_without_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert drop_after(path, 5) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert drop_after(tmp_path / "missing.jsonl", 5) is None
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 1}\n')  # what stays is behind what goes

    def crash(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="no space"):
        drop_after(path, 1)
    assert path.read_text() == '{"step": 2}\n{"step": 1}\n'
    assert [left.name for left in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.undo()
    assert drop_after(path, 1) == 1
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 2 .*expected.*delete") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value)


def test_a_new_run_moves_old_files_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with _open(tmp_path) as writer:
            writer.write_metrics(1, {"loss": loss})
    found = {p.name: _lines(p)[0]["loss"] for p in tmp_path.glob("metrics.jsonl*")}
    assert found == {"metrics.jsonl": 3.0, "metrics.jsonl.old-1": 1.0, "metrics.jsonl.old-2": 2.0}


def test_json_line_refuses_what_json_cannot_hold():
    assert to_json_line({"step": 1, "x": float("-inf")}) == '{"step": 1, "x": null}\n'
    with pytest.raises(TypeError):
        to_json_line({"x": object()})


def test_tensorboard_holds_the_scalars_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _open(tmp_path, tensorboard=True) as writer:
        for step in range(1, 5):
            writer.write_metrics(step, {"loss": float(step)})
    with _open(tmp_path, resume_step=2, tensorboard=True) as writer:
        writer.write_metrics(3, {"loss": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


class _FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.axes, self.finished = [], [], [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def define_metric(self, pattern, step_metric):
        self.axes.append((pattern, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with _open(tmp_path, wandb="project") as writer:
        writer.write_metrics(1, {"loss": 1.0})
    with _open(tmp_path, resume_step=1, wandb="project") as writer:
        writer.write_metrics(2, {"loss": 2.0})
    with _open(tmp_path, wandb="project"):
        pass
    ids = [arguments["id"] for arguments in fake.inits]
    assert ids[0] == ids[1] != ids[2]
    assert {arguments["project"] for arguments in fake.inits} == {"project"}
    assert fake.logged == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert fake.axes == [("*", "step")] * 3 and fake.finished == 3


def test_wandb_missing_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        _open(tmp_path, wandb="project")


def test_a_wandb_that_does_not_begin_is_one_line(tmp_path, monkeypatch):
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(TimeoutError("no\nanswer")))
    with pytest.raises(UserError, match="the logger 'wandb' raised TimeoutError no answer .*key"):
        _open(tmp_path, wandb="project")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "megatron_rl_test", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def _fill(root, room):
    """Leave so many bytes of the file system, rounded up to whole pages."""
    filler = root / "filler"
    filler.unlink(missing_ok=True)
    state = os.statvfs(root)
    filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - room)))


def _scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


def test_a_full_disk_delays_the_records_and_is_said_once(small_disk):
    run_dir, said = small_disk / "run", []
    text = "x" * 3000  # more than half a page: some records are torn where the room ends
    names = ("loss", "lr", "grad_norm", "entropy", "kl_old", "ratio_mean", "ratio_max", "kl_ref")

    def write(step):
        writer.write_metrics(step, dict.fromkeys(names, float(step)))
        writer.write_samples(step, [{"completion": text}, {"completion": text}])

    with _open(run_dir, tensorboard=True, said=said) as writer:
        for step in range(1, 4):
            write(step)
        _fill(small_disk, 0)
        for step in range(4, 60):
            write(step)
            for name in ("metrics.jsonl", "samples.jsonl"):  # whole lines, whenever one looks
                assert (run_dir / name).read_bytes().endswith(b"}\n")
                assert _lines(run_dir / name)
        assert len(_lines(run_dir / "samples.jsonl")) < 20
        files = sorted(line.split(" could not")[0].split("/")[-1] for line in said)
        assert files[0].startswith("events.out.tfevents.")
        assert files[1:] == ["metrics.jsonl", "samples.jsonl"]
        assert all("No space left on device" in line and "make room" in line for line in said)
        (small_disk / "filler").unlink()
        write(60)
    assert [line["step"] for line in _lines(run_dir / "metrics.jsonl")] == list(range(1, 61))
    samples = [line["step"] for line in _lines(run_dir / "samples.jsonl")]
    assert samples == [step for step in range(1, 61) for _ in range(2)]
    assert _scalars(run_dir) == [(step, float(step)) for step in range(1, 61)]
    assert len(said) == 6 and all("is written again" in line for line in said[3:])


def test_what_waits_for_room_is_bounded_and_what_is_lost_is_said(small_disk):
    (small_disk / "log").write_bytes(b"first\n")
    file = AppendFile(small_disk / "log", most_waiting=100)
    _fill(small_disk, 0)
    assert file.append(b"a" * 5000 + b"\n").errno == errno.ENOSPC  # too large to be kept
    assert (file.waiting, file.lost) == (0, 1)
    for number in range(30):  # after some the page that the file has is full
        file.append(b"%09d\n" % number * 20)
    assert file.lost > 1
    (small_disk / "filler").unlink()
    assert file.append(b"last\n") is None
    assert file.close() is None
    lines = (small_disk / "log").read_bytes().split(b"\n")
    assert lines[0] == b"first" and lines[-2:] == [b"last", b""] and b"a" * 10 not in lines[1]


def test_records_that_never_find_room_are_counted_at_the_end(small_disk):
    said = []
    with _open(small_disk, said=said) as writer:
        _fill(small_disk, 0)
        writer.write_metrics(1, {"loss": 1.0})
        writer.write_samples(1, [{"completion": "a"}, {"completion": "b"}])
    assert (small_disk / "metrics.jsonl").read_bytes() == b""
    assert said[-2:] == [
        f"1 record of {small_disk}/metrics.jsonl could not be written and are lost",
        f"2 records of {small_disk}/samples.jsonl could not be written and are lost",
    ]


def test_resuming_on_a_full_disk_cuts_the_files_where_they_are(small_disk):
    with _open(small_disk) as writer:
        for step in range(1, 5):
            writer.write_metrics(step, {"loss": float(step)})
    with (small_disk / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    _fill(small_disk, 0)
    assert drop_after(small_disk / "metrics.jsonl", 3) == 3
    assert [line["step"] for line in _lines(small_disk / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name, resume_step):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError) as told:
        _open(tmp_path, resume_step)
    assert told.value.filename == str(tmp_path / name)
    assert told.value.errno == (errno.ENXIO if resume_step is None else errno.EINVAL)


def test_late_metrics_go_into_the_object_of_the_last_step(tmp_path):
    with _open(tmp_path) as writer:
        writer.write_metrics(1, {"loss": 1.0})
        writer.write_metrics(2, {"loss": 2.0, "memory/peak_gib": 1.0})
    assert last_evaluated(tmp_path, 2) is False and last_evaluated(tmp_path, 3) is None
    with _open(tmp_path, resume_step=2) as writer:
        with pytest.raises(ValueError, match="expected the last"):
            writer.add_to_last(1, {"eval/problems": 4.0}, ())
        writer.add_to_last(2, {"eval/problems": 4.0, "memory/peak_gib": 2.0}, [{"reward": 1.0}])
        writer.write_metrics(3, {"loss": 3.0})
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "memory/peak_gib": 2.0, "eval/problems": 4.0},
        {"step": 3, "loss": 3.0},
    ]
    assert last_evaluated(tmp_path, 2) is True
    assert _lines(tmp_path / "samples.jsonl") == [{"step": 2, "reward": 1.0}]
    with _open(tmp_path, resume_step=2) as writer:
        writer.add_to_last(2, {"eval/problems": 5.0}, [{"reward": 2.0}])
    assert _lines(tmp_path / "samples.jsonl") == [{"step": 2, "reward": 1.0}]
