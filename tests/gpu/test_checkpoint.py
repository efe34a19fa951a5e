"""Checkpoints go from CUDA to the CPU and back, Transformer Engine or not; resuming is exact."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.layout_cases import DEEPSEEK, LATENT, OVER_HEADS
from tests.support.layouts import relative, whole_weights
from tests.support.ranks import run_on_ranks
from tests.support.tiny import tiny_config
from tests.support.tiny_training import build_training

pytestmark = pytest.mark.gpu

MODELS = {
    "plain": {},
    "norm over heads": OVER_HEADS,
    "DeepSeek-V3": {**DEEPSEEK, **LATENT, "num_layers": 4, "num_experts": 8},
}


def config(kind, model):
    return tiny_config(model=model, device={"kind": kind})


def train_and_save(kind, model, root):
    """On a rank: weights and logits after three steps, whose checkpoint is left behind."""
    from megatron_rl.checkpoint.save import save_checkpoint

    training = build_training(config(kind, model))
    losses = [training.step(number) for number in range(3)]
    save_checkpoint(Path(root), 3, state={}, keep=2, **training.for_checkpoint())
    after = whole_weights(training), training.logits().float().cpu().numpy()
    losses += [training.step(number) for number in (3, 4)]
    return losses, *after


def load_and_go_on(kind, model, root):
    """On a rank: the same from the checkpoint."""
    from megatron_rl.checkpoint.restore import load_checkpoint

    training = build_training(config(kind, model), seed=99)
    load_checkpoint(Path(root) / "step_3", **training.for_checkpoint())
    after = whole_weights(training), training.logits().float().cpu().numpy()
    return [training.step(number) for number in (3, 4)], *after


#: (kind, Transformer Engine) of the end that saves and of the end that loads
WAYS = [
    (("cuda", True), ("cuda", True)),
    (("cuda", True), ("cpu", False)),
    (("cpu", False), ("cuda", True)),
    (("cuda", False), ("cuda", True)),
    (("cuda", True), ("cuda", False)),
]


def name_of(end):
    kind, with_te = end
    return f"{kind}-{'te' if with_te else 'local'}"


@pytest.mark.parametrize(
    "name, saved, loaded",
    [
        pytest.param(name, *way, id=f"{name}-{name_of(way[0])}-{name_of(way[1])}")
        for name, model in MODELS.items()
        for way in WAYS
        # Latent attention on CUDA is Transformer Engine's.
        if "kv_lora_rank" not in model or ("cuda", False) not in way
    ],
)
def test_weights_are_the_same_bits_and_training_goes_on(name, saved, loaded, tmp_path):
    (first,), (second,) = (
        run_on_ranks(
            1,
            work,
            kind,
            {**MODELS[name], "transformer_engine": with_te if kind == "cuda" else None},
            str(tmp_path),
            kind=kind,
        )
        for work, (kind, with_te) in ((train_and_save, saved), (load_and_go_on, loaded))
    )
    losses, expected, logits = first
    assert set(second[1]) == set(expected)
    for weight, value in expected.items():
        np.testing.assert_array_equal(second[1][weight], value, err_msg=weight)
    assert relative(second[2], logits) < 1e-5
    np.testing.assert_allclose(second[0], losses[3:], rtol=1e-4)
