"""The launch files set what torchrun.sh reads, and agree with each other."""

import json
import re

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
    assert {"NODES", "NODE_RANK", "MASTER_ADDR", "NODE_ADDR", "PREFLIGHT_S"} <= SETTINGS


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_manifests_start_torchrun_with_settings_it_knows(name):
    spec, container = pod(name)
    assert "tools/launch/torchrun.sh" in " ".join([*container["command"], *container["args"]])
    assert {entry["name"] for entry in container["env"]} <= SETTINGS
    # a pod is not killed before its ranks have had the time that torchrun.sh gives them
    assert spec["terminationGracePeriodSeconds"] > 600
    assert spec["securityContext"]["runAsNonRoot"]


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
    (vllm,) = re.findall(r"(?m)^ARG VLLM=(\S+)", dockerfile)
    assert f"\nVLLM={vllm}\n" in (ROOT / "tools/setup_vllm_venv.sh").read_text()
