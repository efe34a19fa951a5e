"""The limit of open files: raised as far as it may be, and refused before anything fails."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from megatron_rl.device.descriptors import allow_descriptors
from megatron_rl.errors import UserError
try:
    allow_descriptors({ranks})
except UserError as error:
    print(error)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits(soft, hard, ranks):
    code = CODE.format(soft=soft, hard=hard, ranks=ranks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("soft, hard", [(64, 1000), (1000, 1000), (200, 300)])
def test_it_is_raised_as_far_as_it_may(soft, hard):
    assert limits(soft, hard, ranks=8) == [f"{hard} {hard}"]


PREFLIGHT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from megatron_rl.device.node_facts import described, facts_of_this_node
facts = facts_of_this_node(lambda: described(sys.argv[1], [], 2, "generate"), 1, 2)
print(facts["error"])
"""


def test_the_preflight_says_it_before_the_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{preset: tiny_moe}}\ndata: {{tokenizer: {{path: {path}}}}}\n")
    done = subprocess.run(
        [sys.executable, "-c", PREFLIGHT, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("a process may have 64 files open here; expected at least 160 ")


def test_too_few_are_refused_with_what_is_needed():
    assert limits(64, 64, ranks=2) == [
        "a process may have 64 files open here; expected at least 160 for 2 ranks; "
        "raise it with: ulimit -n 4096",
        "64 64",
    ]
