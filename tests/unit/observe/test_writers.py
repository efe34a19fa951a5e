"""The files of a run: strict JSON, one object a step, and resuming as if nothing had happened."""

import json
import math
import sys
import types

import pytest

from megatron_rl.errors import UserError
from megatron_rl.observe.run_files import drop_after, read_jsonl, to_json_line
from megatron_rl.observe.writers import RunWriter


def _open(run_dir, resume_step=None, tensorboard=False, wandb=None):
    return RunWriter(run_dir, tensorboard=tensorboard, wandb=wandb, resume_step=resume_step)


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
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(*_):
        raise OSError("no space")

    monkeypatch.setattr("megatron_rl.observe.run_files.os.replace", crash)
    with pytest.raises(OSError, match="no space"):
        drop_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


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
