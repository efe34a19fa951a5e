"""A tiny countdown recipe, and its runs: each is made once and looked at by several tests.

Learning is real, if small: 60 supervised steps teach the model to solve some of the problems.
"""

import pytest

from tests.support.recipe import make_recipe
from tests.support.runs import started, succeed


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The current directory of every command: data, sft.yaml and rl.yaml."""
    return make_recipe(tmp_path_factory.mktemp("countdown"))


@pytest.fixture(scope="session")
def sft_run(folder):
    """The supervised warm-up: 2 ranks, two experts each. Its directory is runs/sft."""
    return succeed("sft", "sft.yaml", "--observe.tensorboard", "true", cwd=folder, ranks=2)


@pytest.fixture(scope="session")
def rl_run(folder, sft_run):
    """Reinforcement learning, uninterrupted. Its directory is runs/rl."""
    return succeed("train", "rl.yaml", cwd=folder, ranks=2, warm=False)


class Interrupted:
    """The same run in runs/broken: killed, continued and stopped, continued to the end, rerun.

    Attributes: metrics and samples (text) as the killed run left them, and the four commands'
    results.
    """

    def __init__(self, folder):
        self.run_dir = folder / "runs" / "broken"
        command = ["train", "rl.yaml", "--run_dir", "runs/broken"]
        with started(*command, cwd=folder, ranks=2) as process:
            process.wait_for("step 5/8")
            process.kill_ranks()
            self.killed = process.wait()
        self.metrics = (self.run_dir / "metrics.jsonl").read_text()
        self.samples = (self.run_dir / "samples.jsonl").read_text()
        self.checkpoints_of_killed = self.checkpoints()
        with started(*command, cwd=folder, ranks=2) as process:
            process.wait_for("step 5/8")
            process.terminate()
            self.stopped = process.wait()
        self.checkpoints_of_stopped = self.checkpoints()
        self.finished = succeed(*command, cwd=folder, ranks=2)
        self.files_of_finished = self.files()
        self.rerun = succeed(*command, cwd=folder, ranks=2)

    def checkpoints(self):
        """Names of the complete checkpoints."""
        found = self.run_dir.glob("checkpoints/step_*/manifest.json")
        return {path.parent.name for path in found}

    def files(self):
        """Content of every file but the report's."""
        return {
            str(path.relative_to(self.run_dir)): path.read_bytes()
            for path in self.run_dir.rglob("*")
            if path.is_file() and path.name != "report.html"
        }


@pytest.fixture(scope="session")
def interrupted(folder, sft_run):
    return Interrupted(folder)
