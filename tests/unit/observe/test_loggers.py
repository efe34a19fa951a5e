"""The loggers of a run: which there are, what they are given, and what becomes of their errors."""

import json
import sys

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.config.loggers import chosen_loggers
from megatron_rl.config.schema_observe import ObserveConfig
from megatron_rl.errors import UserError
from megatron_rl.observe.writers import RunWriter

OWN = """
from megatron_rl.extend import Settings, logger

class Listed:
    calls = []

    def __init__(self, run):
        self.calls.append(("made", str(run.directory), run.resume_step, run.config.get("seed")))

    def log(self, step, metrics):
        self.calls.append((step, dict(metrics)))
        metrics.clear()

    def close(self):
        self.calls.append("closed")

class Second(Listed):
    calls = []

class Flaky(Listed):
    calls = []

    def log(self, step, metrics):
        self.calls.append(step)
        if step in (2, 3, 5):
            raise SystemExit("gone") if step == 5 else ConnectionError("no\\nanswer")

    def close(self):
        raise ValueError("not open")

class Fails(Listed):
    def __init__(self, run):
        raise OSError("no such host")

class Loud(Settings):
    level: int = 3

@logger(settings=Loud)
class WithSettings(Listed):
    def __init__(self, run, settings):
        self.calls.append(settings.level)

def by_function(run):
    return Second(run)

def nothing(run):
    return 3

class NoClose:
    def __init__(self, run): ...
    def log(self, step, metrics): ...

class OneArgument:
    def __init__(self, run): ...
    def log(self, metrics): ...
    def close(self): ...
"""


@pytest.fixture
def own(tmp_path):
    """The file, and the module once it is imported."""
    path = tmp_path / "own.py"
    path.write_text(OWN)

    def module():
        return next(m for m in sys.modules.values() if getattr(m, "__file__", 0) == str(path))

    return path, module


def opened(run_dir, loggers, said=None, **more):
    observe = ObserveConfig(tensorboard=False, loggers=loggers)
    warn = ([] if said is None else said).append
    return RunWriter(run_dir, loggers=chosen_loggers(observe), warn=warn, **more)


def test_each_logger_is_given_each_step_and_closed(own, tmp_path):
    path, module = own
    run = tmp_path / "run"
    with opened(run, [f"{path}:Listed", f"{path}:by_function"], config={"seed": 7}) as writer:
        writer.write_metrics(0, {"eval/pass@1": 0.5})
        writer.write_metrics(1, {"loss": 1.0})
        writer.add_to_last(1, {"eval/pass@1": 0.75}, ())
    expected = [
        ("made", str(run), None, 7),
        (0, {"eval/pass@1": 0.5}),
        (1, {"loss": 1.0}),
        (1, {"eval/pass@1": 0.75}),
        "closed",
    ]
    assert module().Listed.calls == expected and module().Second.calls == expected
    with opened(run, [f"{path}:Listed"], resume_step=1) as writer:
        writer.write_metrics(2, {"loss": 2.0})
    assert module().Listed.calls[5:] == [("made", str(run), 1, None), (2, {"loss": 2.0}), "closed"]


def test_one_that_raises_is_told_of_once_and_loses_nothing_else(own, tmp_path):
    path, module = own
    said, name = [], f"{path}:Flaky"
    with opened(tmp_path / "run", [name, f"{path}:Second"], said) as writer:
        for step in range(1, 7):
            writer.write_metrics(step, {"loss": float(step)})
    assert module().Flaky.calls[1:] == [1, 2, 3, 4, 5, 6]
    assert [call[0] for call in module().Second.calls[1:-1]] == [1, 2, 3, 4, 5, 6]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.split(" (")[0] for line in said] == [
        f"at step 2 the logger {name!r} raised ConnectionError no answer",
        f"the logger {name!r} takes steps again, from step 4 on",
        f"at step 5 the logger {name!r} raised SystemExit gone",
        f"the logger {name!r} takes steps again, from step 6 on",
        f"the logger {name!r}, closed, raised ValueError not open",
    ]
    assert all("\n" not in line for line in said)
    assert "own.py:" in said[0] and "metrics.jsonl has every step; the run goes on" in said[0]


def test_one_that_cannot_be_made_is_refused_and_moves_nothing(own, tmp_path):
    path, module = own
    run = tmp_path / "run"
    with opened(run, []) as writer:
        writer.write_metrics(1, {"loss": 1.0})
    for name, words in (
        ("Fails", "raised OSError no such host ("),
        ("nothing", "makes an object of type int without log; expected one with log(step, metr"),
    ):
        with pytest.raises(UserError, match="correct it, or leave it out of obs") as error:
            opened(run, [f"{path}:{name}"])
        assert words in str(error.value) and "\n" not in str(error.value)
    assert [file.name for file in run.iterdir() if file.name.startswith("metrics")] == [
        "metrics.jsonl"
    ]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_keys_of_before_and_the_list_name_the_same_loggers():
    def names(**observe):
        return [one.row.name for one in chosen_loggers(ObserveConfig(**observe))]

    assert names() == ["tensorboard"]
    assert names(tensorboard=False) == []
    assert names(loggers=["tensorboard"]) == ["tensorboard"]
    assert names(tensorboard=False, loggers=["tensorboard"]) == ["tensorboard"]
    assert names(wandb="mine") == ["tensorboard", "wandb"]
    by_key = chosen_loggers(ObserveConfig(wandb="mine"))
    settings = {"name": "wandb", "settings": {"project": "mine"}}
    assert chosen_loggers(ObserveConfig(loggers=[settings])) == by_key


def test_settings_of_ones_own(own, tmp_path):
    path, module = own
    given = {"name": f"{path}:WithSettings", "settings": {"level": 5}}
    with opened(tmp_path / "run", [given]):
        pass
    assert module().Listed.calls == [5, "closed"]


@pytest.mark.parametrize(
    ("loggers", "words"),
    [
        (["tensorbord"], "observe.loggers.0.name is 'tensorbord' (did you mean tensorboard?)"),
        (
            ["OWN:NoClose"],
            "a class without close; expected a logger, with log(step, metrics), close()",
        ),
        (["OWN:OneArgument"], "log(self, metrics); expected log(self, step, metrics)"),
        (["OWN:Listd"], "own.py has no Listd (did you mean Listed?)"),
        (["OWN:Listed", "OWN:Listed"], "as observe.loggers.0 is; expected each logger once"),
        (["wandb"], "observe.loggers.0.settings.project is not given; the logger wandb expects"),
        ([{"name": "tensorboard", "settings": {"a": 1}}], "expected none: it has no settings"),
        ([{"name": "OWN:WithSettings", "settings": {"level": "x"}}], "expected an integer"),
    ],
)
def test_mistakes_are_one_line_before_a_run(own, loggers, words):
    path, _ = own
    given = json.loads(json.dumps(loggers).replace("OWN", str(path)))
    with pytest.raises(UserError) as error:
        chosen_loggers(ObserveConfig(tensorboard=True, loggers=given))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_name_alone_stands_for_a_logger_in_yaml():
    config = load_config(None, ["--observe.loggers", "[tensorboard, {name: ./x.py:X}]"])
    assert [(one.name, one.settings) for one in config.observe.loggers] == [
        ("tensorboard", {}),
        ("./x.py:X", {}),
    ]
    with pytest.raises(UserError, match="observe.loggers is .*expected a list, each a mapping"):
        load_config(None, ["--observe.loggers", "[3]"])
