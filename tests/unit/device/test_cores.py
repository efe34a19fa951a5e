"""Cores a process may use."""

import os

import pytest

from megatron_rl.device.cores import usable_cores
from megatron_rl.device.launch import Launch


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A file system with files of control groups, of a machine with 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),
        (  # the limit of the job, with one of its own for the step
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/job/step/cpu.max": "800000 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:memory:/pod\n2:cpu,cpuacct:/pod\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
    ],
)
def test_the_tightest_limit_counts(machine, files, cores):
    assert usable_cores(machine(files)) == cores


def test_ranks_of_a_machine_share_them(monkeypatch):
    monkeypatch.setattr("megatron_rl.device.launch.usable_cores", lambda: 28)
    assert [Launch(0, 16, 0, local, launched=True).cores for local in (1, 8, 64)] == [28, 3, 1]
