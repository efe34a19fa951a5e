"""The verb on the command line: its flags, and what it refuses."""

import re

import pytest

from megatron_rl.cli import main
from tests.support.stand_in_study import lay_out

ARMS = "arms: {a: {optimizer.lr: 0.1}, b: {optimizer.lr: 0.2}}\nseeds: 2\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, ARMS)
    return tmp_path


MISTAKES = {
    "a key": (["--train.steps", "3"], "study: found --train.steps; expected only STUDY and its"),
    "two modes": (["--status", "--report"], "study: found --status and --report; expected one"),
    "an index": (["--only", "-1"], "--only is -1; expected at least 0"),
    "no runs": (["--at-once", "0"], "--at-once is 0; expected at least 1"),
    "a launch": (["--launch", "ray"], "argument --launch: invalid choice: 'ray'"),
}


@pytest.mark.parametrize("words, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(words, message, capsys, folder):
    assert main(["study", "study.yaml", *words]) == 2
    assert capsys.readouterr().err.startswith(f"megatron-rl: error: {message}")
    assert not (folder / "out").exists()


def test_a_file_that_is_missing(capsys):
    assert main(["study", "none.yaml"]) == 2
    expected = "megatron-rl: error: config file none.yaml does not exist; expected a YAML file\n"
    assert capsys.readouterr().err == expected


def test_status_before_anything_has_run(capsys, folder):
    assert main(["study", "study.yaml", "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a", "1", "waiting", "0/6"],
        ["b", "1", "waiting", "0/6"],
        ["a", "2", "waiting", "0/6"],
        ["b", "2", "waiting", "0/6"],
        ["0", "of", "4", "runs", "done"],
    ]
    assert not (folder / "out").exists()


def test_a_report_before_anything_has_run(capsys, folder):
    assert main(["study", "study.yaml", "--report", "--quick"]) == 0
    assert capsys.readouterr().out == "no run has ended yet\nout/quick/study.html\n"
    written = {path.name for path in (folder / "out/quick").iterdir()}
    assert written == {"results.csv", "runs.csv", "summary.csv", "study.html"}
    assert (folder / "out/quick/results.csv").read_text() == "arm,seed,step,metric,value\n"


def test_slurm_gets_the_same_command(capsys, folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    words = ["study", "study.yaml", "--quick", "--launch", "slurm", "--at-once", "3"]
    assert main(words) == 0
    assert "sbatch --parsable --array=0-3%3 out/quick/study.sbatch" in capsys.readouterr().out
    text = (folder / "out/quick/study.sbatch").read_text()
    assert re.search(r"-m megatron_rl study study\.yaml --quick --only \"\$SLURM", text)
