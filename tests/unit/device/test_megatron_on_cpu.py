import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.device import megatron_on_cpu
from tests.support.ranks import ROOT, run_on_ranks
from tests.support.tiny import cpu_device


def test_cuda_calls_of_megatron_stay_on_the_cpu():
    cpu_device()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, device="cuda:0").device.type == "cpu"
    assert torch.tensor([1.0], device="cuda").device.type == "cpu"
    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor
    assert torch.cuda.current_device() == torch.device("cpu")
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.int64).tolist() == [0, 1, 2]
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
    assert event.query()


def test_a_device_context_still_reaches_the_factories():
    """transformers builds models inside ``torch.device("meta")`` and fills what is on it later."""
    cpu_device()
    with torch.device("meta"):
        made = [torch.zeros(2), torch.ones(2), torch.tensor([1.0]), torch.empty(2)]
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_random_states_are_those_of_the_cpu_generator():
    cpu_device()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_gloo_groups_share_a_device_and_its_thread():
    assert run_on_ranks(2, threads_that_wake, 5) == [(1, 2.0)] * 2


def threads_that_wake(count):
    """How many threads of gloo's devices there are with so many groups; and a sum over the last."""
    groups = [dist.new_group() for _ in range(count)]
    total = torch.ones(1)
    dist.all_reduce(total, group=groups[-1])
    names = [thread / "comm" for thread in Path("/proc/self/task").iterdir()]
    return sum(name.read_text() == "gloo_tcp_loop\n" for name in names), total.item()


def test_the_timeout_of_a_gloo_group_is_the_one_given():
    assert run_on_ranks(2, timed_out_after, 0.5) == [True, False]


def timed_out_after(seconds):
    """Whether this rank waited in vain for the other, in a group of that timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    if dist.get_rank() == 1:
        return False
    with pytest.raises(RuntimeError, match="[Tt]imed out"):
        dist.barrier(group)
    return True


def test_norm_and_clipping_of_many_gradients_are_not_one_by_one(monkeypatch):
    cpu_device()
    from megatron.core.optimizer import clip_grads

    monkeypatch.setattr(torch, "norm", None)  # which Megatron would call for each

    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (1, 4, 50)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    before = [parameter.grad.clone() for parameter in parameters]
    norm, _ = clip_grads.l2_norm_impl(0, None, [before], False)
    whole = torch.cat([gradient.double().flatten() for gradient in before])
    expected = torch.linalg.vector_norm(whole)
    assert norm.shape == (1,) and float(norm) == pytest.approx(float(expected), rel=1e-6)
    clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=0.5, total_norm=float(norm))
    for parameter, gradient in zip(parameters, before, strict=True):
        scaled = gradient * (0.5 / (float(norm) + 1e-6))
        torch.testing.assert_close(parameter.grad, scaled)
    copies = [torch.zeros_like(gradient) for gradient in before]
    clip_grads.multi_tensor_scale_impl(0, None, [before, copies], 2.0)
    torch.testing.assert_close(copies, [2 * gradient for gradient in before])


def test_a_second_installation_changes_nothing():
    cpu_device()
    before = torch.zeros, torch.Tensor.type
    megatron_on_cpu.install()
    assert (torch.zeros, torch.Tensor.type) == before


def test_megatrons_small_functions_are_left_uncompiled_and_torch_compile_as_it_was():
    code = (  # in a process of its own: Megatron decides when it is imported
        "from tests.support.tiny import cpu_device\n"
        "cpu_device()\n"
        "import torch\n"
        "from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "for function in swiglu, torch.compile(lambda x: x, backend='eager'):\n"
        "    print(hasattr(function, '_torchdynamo_orig_callable'))\n"
    )
    assert output_of(code).split() == ["False", "True"]


def output_of(code, *places):
    """What a new interpreter prints, with these directories to import from."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*places, ROOT]))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def unequal_parts(sizes):
    """On a rank: the gathered rows, and the gradient of a part's weighted sum, over the ranks."""
    cpu_device()
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    rank, group = dist.get_rank(), dist.group.WORLD
    rows = torch.full((sizes[rank], 2), float(rank + 1), requires_grad=True)
    gathered = mappings.gather_from_sequence_parallel_region(rows, True, group, sizes)
    (gathered * (rank + 1)).sum().backward()
    whole = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (rank + 1)
    part = mappings.reduce_scatter_to_sequence_parallel_region(whole, group, sizes)
    return gathered.detach().tolist(), rows.grad.tolist(), part.tolist()


@pytest.mark.parametrize("sizes", [[1, 3], [2, 0]])
def test_ranks_with_unequal_numbers_of_rows_are_gathered_and_reduced(sizes):
    """As expert-tensor ranks are under expert parallelism: rank r's rows are r + 1."""
    results = run_on_ranks(2, unequal_parts, sizes)
    rows = [[float(rank + 1)] * 2 for rank in range(2) for _ in range(sizes[rank])]
    totals = [[3.0 * (2 * row), 3.0 * (2 * row + 1)] for row in range(sum(sizes))]
    parts = [totals[: sizes[0]], totals[sizes[0] :]]
    for rank, (gathered, gradient, part) in enumerate(results):
        assert gathered == rows
        assert gradient == [[3.0, 3.0]] * sizes[rank]  # 1 + 2, from both ranks
        assert part == parts[rank]


def test_libraries_for_cuda_are_left_alone_on_a_cpu(tmp_path):
    """Megatron takes its optimizer and more from them wherever they can be imported."""
    for library in ("transformer_engine", "apex"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('imported')\n")
    code = (
        "from tests.support.tiny import tiny_config\n"
        "from tests.support.tiny_training import build_training\n"
        "print(build_training(tiny_config()).step(0))\n"
    )
    assert float(output_of(code, tmp_path)) > 0
