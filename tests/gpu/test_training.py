"""RSPO on CUDA and NCCL, with and without Transformer Engine, trains like a process on the CPU."""

import dataclasses

import pytest
import torch

from tests.support.layout_cases import (
    AUX,
    BF16,
    CASES,
    DEEPSEEK,
    DENSE,
    FULL,
    GATED,
    GMPO,
    LATENT,
    MANY_EXPERTS,
    ODD,
    OVER_HEADS,
    SELECTIVE,
    TOLERANCE,
    Case,
)
from tests.support.layouts import (
    References,
    beyond,
    compare,
    compare_in_bf16,
    run_case,
)

pytestmark = pytest.mark.gpu

#: On a CPU attention is computed in fp32, so that CUDA rounds to bf16 more often.
CUDA_BF16 = 2.0
WITH, WITHOUT = {"transformer_engine": True}, {"transformer_engine": False}
#: name: (model, parallel, algorithm)
MODELS = {
    "plain": ({}, {}, {}),
    "gated shared expert": (GATED, {}, {}),
    "norm over heads": (OVER_HEADS, {}, {}),
    "as DeepSeek": (DEEPSEEK, {}, {}),
    "260 experts": (MANY_EXPERTS, {}, {}),
    "aux and z loss": (AUX, {}, {}),
    "tied, odd vocabulary": ({**ODD, "tie_embeddings": True}, {}, {}),
    "dense": (DENSE, {}, GMPO),
    "recompute full": ({}, FULL, {}),
    "recompute selective": ({}, SELECTIVE, {}),
    "sharded optimizer": ({}, {"distributed_optimizer": True, "overlap_grad_reduce": True}, {}),
}
LATENT_MODELS = {"DeepSeek-V3": ({**DEEPSEEK, **LATENT}, {}, {})}


def on_cuda(models, layers) -> list:
    return [
        pytest.param(
            Case(name, 1, parallel, {**model, **layers}, algorithm=algorithm, device="cuda"),
            id=f"{name}-{'te' if layers is WITH else 'local'}",
        )
        for name, (model, parallel, algorithm) in models.items()
    ]


@pytest.fixture(scope="module")
def references() -> References:
    return References()


@pytest.mark.parametrize(
    "case", [*on_cuda(MODELS, WITHOUT), *on_cuda({**MODELS, **LATENT_MODELS}, WITH)]
)
def test_in_fp32_cuda_trains_like_the_cpu(case: Case, references: References):
    difference = compare(run_case(case), references.of(case))
    print(f"{case.name}: {difference.largest:.1e} {difference.worst}")
    assert difference.largest < TOLERANCE, difference


@pytest.mark.parametrize("layers", [WITHOUT, WITH], ids=["local", "te"])
@pytest.mark.parametrize("name", ["plain", "as DeepSeek", "norm over heads"])
def test_in_bf16_cuda_is_about_as_far_off_as_bf16_itself(name, layers, references: References):
    model, parallel, algorithm = MODELS[name]
    case = Case(name, 1, parallel, {**model, **BF16, **layers}, algorithm=algorithm, device="cuda")
    factors, on_the_cpu = compare_in_bf16(case, references)
    bounds = {number: CUDA_BF16 * bound for number, bound in on_the_cpu.items()}
    print(f"{name}: {factors}, at most {bounds}")
    assert not beyond(factors, bounds), (factors, bounds)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            dataclasses.replace(case, model={**case.model, **layers}, device="cuda"),
            id=f"{case.name}-{'te' if layers is WITH else 'local'}",
        )
        for case in CASES
        for layers in (WITHOUT, WITH)
        # Latent attention on CUDA is Transformer Engine's.
        if 2 <= case.ranks <= torch.cuda.device_count()
        and (layers is WITH or "kv_lora_rank" not in case.model)
    ],
)
def test_layouts_over_the_devices_of_this_machine(case: Case, references: References):
    difference = compare(run_case(case), references.of(case))
    assert difference.largest < TOLERANCE, difference
