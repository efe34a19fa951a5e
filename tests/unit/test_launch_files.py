"""The launch files set what torchrun.sh reads, and agree with each other."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time

import pytest
import yaml

from tests.support.runs import ROOT

LAUNCH = ROOT / "tools" / "launch"
SETTINGS = set(re.findall(r"(?m)^#   ([A-Z_]+)", (LAUNCH / "torchrun.sh").read_text()))


def documents(name):
    """The YAML documents of a file, anchors resolved."""
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def pod(name):
    """(pod specification, its container) of a manifest."""
    *_, job = documents(f"kubernetes/{name}")
    if name == "pytorchjob.yaml":
        specs = [r["template"]["spec"] for r in job["spec"]["pytorchReplicaSpecs"].values()]
        assert specs[0] == specs[1]
        spec = specs[0]
    else:
        spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_the_header_of_torchrun_names_what_it_reads():
    read = set(re.findall(r"\$\{([A-Z_]+):-", (LAUNCH / "torchrun.sh").read_text()))
    assert read - {"OMP_NUM_THREADS"} <= SETTINGS
    assert {"NODES", "NODE_RANK", "MASTER_ADDR", "PREFLIGHT_S"} <= SETTINGS


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_manifests_start_torchrun_with_settings_it_knows(name):
    spec, container = pod(name)
    assert "tools/launch/torchrun.sh" in " ".join([*container["command"], *container["args"]])
    assert {entry["name"] for entry in container["env"]} <= SETTINGS
    # a pod is not killed before its ranks have had the time that torchrun.sh gives them
    assert spec["terminationGracePeriodSeconds"] > 600
    assert spec["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_paths_of_a_pod_are_on_the_volume_and_it_has_what_rdma_needs(name):
    _, container = pod(name)
    assert container["workingDir"] in [one["mountPath"] for one in container["volumeMounts"]]
    words = shlex.split(" ".join([*container["command"], *container["args"]]))
    assert "/opt/megatron_rl/tools/launch/torchrun.sh" in words  # of the image
    config = words[words.index("train") + 1]
    assert not config.startswith("/")
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
    assert {"cpu", "memory"} <= set(requests)
    devices = {one: count for one, count in requests.items() if "/" in one}
    assert [one.split("/")[0] for one in devices] == ["nvidia.com", "rdma"]
    assert devices.items() <= limits.items()


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_the_probes_of_a_pod_ask_for_the_file_that_its_run_touches(name, tmp_path):
    """They are run, with a file of this test in the place of the pod's."""
    _, container = pod(name)
    words = shlex.split(" ".join(container["args"]))
    path = words[words.index("--device.heartbeat_file") + 1]
    file = tmp_path / "heartbeat"

    def passes(probe):
        command = container[probe]["exec"]["command"]
        assert path in " ".join(command)
        return subprocess.run([word.replace(path, str(file)) for word in command]).returncode == 0

    assert not passes("startupProbe")
    file.touch()
    assert passes("startupProbe") and passes("livenessProbe")
    aged = time.time() - 3600
    os.utime(file, (aged, aged))
    assert passes("startupProbe") and not passes("livenessProbe")


def test_a_probe_gives_a_run_the_time_in_which_it_ends_by_itself():
    """A rank that is stopped for a moment, and nodes that end one after the other, are no fault."""
    probe = pod("job.yaml")[1]["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


@pytest.mark.parametrize(
    ("pyxis", "programs", "expected"),
    [
        (
            True,
            ["srun"],
            "srun --kill-on-bad-exit=1 --container-image image.sqsh --container-mounts "
            "{here}:{here},/data:/data --container-workdir {here} bash -c",
        ),
        (
            False,
            ["srun", "apptainer"],
            "srun --kill-on-bad-exit=1 apptainer exec --nv --bind {here}:{here},/data:/data --pwd "
            "{here} image.sqsh bash -c",
        ),
    ],
)
def test_a_slurm_task_runs_in_the_container_that_is_named(tmp_path, pyxis, programs, expected):
    """Slurm's commands print their words in the place of starting anything."""
    shown = submit(
        tmp_path, programs, pyxis, CONTAINER="image.sqsh", CONTAINER_MOUNTS="/data:/data"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(expected.format(here=tmp_path))
    assert shown.stdout.endswith("torchrun.sh train c.yaml\n")


def test_a_slurm_task_without_a_container_is_as_it_was(tmp_path):
    shown = submit(tmp_path, ["srun"], pyxis=True)
    assert shown.stdout.startswith("srun --kill-on-bad-exit=1 bash -c NODE_RANK=$SLURM_NODEID exec")


def test_a_container_that_nothing_can_run_is_refused(tmp_path):
    shown = submit(tmp_path, ["srun"], pyxis=False, CONTAINER="image.sif")
    assert shown.returncode == 2
    assert shown.stderr == (
        "slurm.sbatch: CONTAINER is 'image.sif'; expected pyxis (srun --container-image) or "
        "apptainer\n"
    )


def submit(folder, programs, pyxis=False, **settings):
    """slurm.sbatch in a folder, with programs that print their words and nothing else of the kind.

    scontrol knows 99,000 hosts, the first of which is called 1000, and the help of srun is as long:
    whoever leaves such a pipe early breaks it.
    """
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    texts = {name: 'echo "${0##*/} $@"' for name in programs}
    texts["scontrol"] = (
        'case "$2 $3" in host*) seq 1000 99999 ;; "node 1000") echo NodeAddr=10.0.0.1 ;; esac'
    )
    if pyxis:
        texts["srun"] = (
            '[ "$1" != --help ] || { echo "--container-image"; seq 99999; }; ' + texts["srun"]
        )
    for name, text in texts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    for name in ("bash", "sh", "seq", "grep", "cut"):  # an apptainer of this machine is not found
        (bin_folder / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(bin_folder), "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", **settings}
    return subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "train", "c.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_job_has_a_pod_for_each_node_and_finds_the_first():
    service, job = documents("kubernetes/job.yaml")
    spec, container = pod("job.yaml")
    settings = {entry["name"]: entry.get("value") for entry in container["env"]}
    nodes = job["spec"]["completions"]
    assert (job["spec"]["parallelism"], settings["NODES"]) == (nodes, str(nodes))
    assert settings["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(settings["RANKS_PER_NODE"])
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]


def test_compose_sets_what_torchrun_reads_and_its_nodes_differ_in_their_number_only():
    services = documents("compose.yaml")[0]["services"]
    for name in ("train", "node0", "node1"):
        assert set(services[name]["environment"]) <= SETTINGS
    first, second = services["node0"], services["node1"]
    assert second["environment"] == {**first["environment"], "NODE_RANK": "1"}
    assert {**second, "environment": None} == {**first, "environment": None}


def test_the_images_run_as_the_user_that_the_manifests_name():
    dockerfile = (ROOT / "Dockerfile").read_text()
    ids = set(re.findall(r"--uid (\d+)", dockerfile)) | set(
        re.findall(r"(?m)^USER (\S+)", dockerfile)
    )
    assert ids == {str(pod("job.yaml")[0]["securityContext"]["runAsUser"])}
    targets = set(re.findall(r"(?m)^FROM .* AS (\w+)$", dockerfile))
    images = {pod(name)[1]["image"] for name in ("job.yaml", "pytorchjob.yaml")}
    assert {image.split(":")[1] for image in images} <= targets == {"cpu", "cuda"}
    # a layer of packages must not depend on the code
    last_copy = dockerfile.rindex("COPY --chown=megatron:megatron . .")
    assert "pip install" not in dockerfile[last_copy:]
    for line in re.findall(r"(?m)^(?:CMD|SHELL) (.*)$", dockerfile):
        assert json.loads(line)


def test_the_image_has_the_torch_that_the_scripts_install():
    dockerfile, script = (
        (ROOT / "Dockerfile").read_text(),
        (ROOT / "tools/setup_venv.sh").read_text(),
    )
    (torch,) = re.findall(r"(?m)^ARG TORCH=(\S+)", dockerfile)
    assert f"\nTORCH={torch}\n" in script
    assert f"\nTORCH={torch}\n" in (ROOT / "tools/setup_trl_venv.sh").read_text()
    (vllm,) = re.findall(r"(?m)^ARG VLLM=(\S+)", dockerfile)
    assert f"\nVLLM={vllm}\n" in (ROOT / "tools/setup_vllm_venv.sh").read_text()
