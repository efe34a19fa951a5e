"""A user's own optimizer: tried before a run, and stepped in the place of Adam."""

import math

import pytest
import torch

from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import find
from megatron_rl.config.checks import check_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.optimizers.trial import check_optimizer
from tests.support.layouts import Case, layout_config, policy_of
from tests.support.runs import ROOT

LION = f"{ROOT}/examples/extend/my_optimizer.py:Lion"

OWN = """
import torch
from megatron_rl.extend import Settings, optimizer

class Base(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.one(parameter, parameter.grad, group)

class Right(Base):
    def one(self, parameter, gradient, group):
        state = self.state[parameter]
        state.setdefault("sum", torch.zeros_like(parameter)).add_(gradient.abs())
        state["step"] = state.get("step", 0) + 1
        parameter.sub_(gradient / (1 + state["sum"]) / state["step"], alpha=group["lr"])

class Still(Base):
    def one(self, parameter, gradient, group):
        pass

class Rateless(Base):
    def one(self, parameter, gradient, group):
        parameter.sub_(gradient)

class Rows(Base):
    def one(self, parameter, gradient, group):
        self.state[parameter]["rows"] = gradient.sum(-1)
        parameter.sub_(gradient, alpha=group["lr"])

class Hidden(Base):
    count = 0
    def one(self, parameter, gradient, group):
        self.count += 1
        parameter.sub_(gradient, alpha=group["lr"] / self.count)

class Late(Base):
    def one(self, parameter, gradient, group):
        if gradient.any():
            self.state[parameter]["sum"] = gradient.clone()
        parameter.sub_(gradient, alpha=group["lr"])

class Raises(Base):
    def one(self, parameter, gradient, group):
        raise KeyError("nothing")

class Reserved(Base):
    def one(self, parameter, gradient, group):
        self.state[parameter]["param"] = gradient.clone()
        parameter.sub_(gradient, alpha=group["lr"])

def none(params):
    return 3

def others(params):
    return Right([{"params": [torch.zeros(2)]}])

class NoStep:
    def __init__(self, params):
        pass

class Two(Right):
    def __init__(self, params, rate):
        pass
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Still", "expected other finite weights of every parameter"),
        ("Rateless", "moves weights at learning rate 0"),
        ("Rows", "keeps 'rows' [4] for a parameter [4, 6]; expected a tensor of the parameter's"),
        ("Hidden", "does not go on from its state as if it had not been interrupted"),
        ("Late", "keeps sum after two steps and nothing after one with gradients of 0"),
        ("Raises", "raised KeyError 'nothing' ("),
        ("Reserved", "keeps 'param' [4, 6] for a parameter [4, 6]"),
        ("none", "is of type int; expected a torch.optim.Optimizer"),
        ("others", "has other parameters in its param_groups than it was given"),
        ("NoStep", "a class without step; expected an optimizer, with step()"),
        ("Two", "expected Two(params)"),
    ],
)
def test_what_a_run_could_not_use_is_refused_before_it_starts(own, name, words):
    with pytest.raises(UserError) as error:
        checked(f"{own}:{name}")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value)


def checked(name, parallel=None, **optimizer):
    sections = {"optimizer": {"name": name, **optimizer}, "parallel": parallel or {}}
    config = Config.model_validate({"model": MODEL_PRESETS["tiny_moe"], **sections})
    check_config(config, None, "sft", files=False)


@pytest.mark.parametrize("name", ["torch.optim:SGD", "torch.optim:RMSprop", LION])
def test_right_ones_are_accepted(name):
    checked(name)


def test_shipped_ones_pass_the_same_trial():
    row = find(kinds.OPTIMIZERS, "muon")
    for routers in (False, True):
        check_optimizer(row, row.settings(routers=routers))


@pytest.mark.parametrize(
    ("name", "parallel", "optimizer", "words"),
    [
        (
            "muon",
            {"distributed_optimizer": True},
            {},
            "distributed_optimizer is true with the opti",
        ),
        (LION, {"distributed_optimizer": True}, {}, "cannot be cut into shards"),
        ("torch.optim:SGD", {"tensor": 2}, {}, "parallel.tensor 2 with the optimizer torch.optim"),
        ("torch.optim:SGD", {"expert": 2}, {}, "parallel.expert 2 with the optimizer torch.optim"),
        ("muon", {}, {"beta1": 0.5, "settings": {"beta1": 0.6}}, "optimizer.beta1 is 0.5 and"),
        ("torch.optim:SGD", {}, {"epsilon": 0.5}, "optimizer.epsilon is 0.5 with the optimizer"),
        ("adam", {}, {"settings": {"momentum": 0.5}}, "optimizer.settings.momentum is no setting"),
        ("muon", {}, {"settings": {"scale": "rsm"}}, "expected one of rms, spectral"),
    ],
)
def test_what_does_not_go_together_is_refused(name, parallel, optimizer, words):
    with pytest.raises(UserError) as error:
        checked(name, parallel, **optimizer)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_layouts_that_a_trait_allows_are_accepted():
    for name in ("muon", LION):
        checked(name, {"tensor": 2, "expert": 2})
    checked("torch.optim:SGD", {"pipeline": 2})
    checked("adam", {"distributed_optimizer": True}, beta1=0.5, settings={"beta1": 0.5})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ones_own_steps_the_main_weights_of_a_policy(own, dtype):
    config = layout_config(Case("one", 1, {}, {"num_layers": 1, "dtype": dtype}))
    optimizer = {"name": f"{own}:Right", "lr": 0.5, "clip_grad": 0.0, "epsilon": 1e-8}
    section = config.optimizer.model_copy(update=optimizer)
    with policy_of(config.model_copy(update={"optimizer": section})) as policy:
        weight = policy.chunks[0].decoder.layers[0].mlp.experts.linear_fc1.weight
        expected = weight.detach().float()
        policy.wrapped[0].zero_grad_buffer()
        total = torch.zeros_like(expected)
        for number in (1, 2):
            generator = torch.Generator().manual_seed(number)
            gradient = torch.randn(weight.shape, generator=generator)
            weight.main_grad.copy_(gradient)
            total += gradient.abs()
            expected = expected - 0.5 * gradient / (1 + total) / number
            policy.scheduler.step(increment=1)
            succeeded, norm, _ = policy.optimizer.step()
            assert succeeded and norm == pytest.approx(math.sqrt(gradient.square().sum()), rel=1e-4)
        main = getattr(weight, "main_param", weight)
        torch.testing.assert_close(main.detach(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight.detach(), main.detach().to(weight.dtype))
