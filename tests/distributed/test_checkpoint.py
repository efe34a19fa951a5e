"""Checkpoints written and read by several ranks, at the same layout and at others."""

from pathlib import Path

import pytest
import torch

from tests.support.ranks import RankFailure, run_on_ranks
from tests.support.tiny import tiny_config
from tests.support.tiny_training import build_training

EXPERT = {"expert": 2}
DISTRIBUTED = {"distributed_optimizer": True}


def config(parallel, model=None):
    return tiny_config(parallel=parallel, model=model or {})


def save(training, root, step):
    from megatron_rl.checkpoint.save import save_checkpoint

    return save_checkpoint(
        Path(root), step, state={"step": step}, keep=2, **training.for_checkpoint()
    )


def load(training, path):
    from megatron_rl.checkpoint.restore import load_checkpoint

    return load_checkpoint(path, **training.for_checkpoint())


def resume(parallel, model, root):
    """On a rank: (losses, weights, main weights) of a run never stopped, and of one resumed."""
    results = []
    uninterrupted = build_training(config(parallel, model))
    losses = [uninterrupted.step(i) for i in range(5)]
    results.append((losses, list(uninterrupted.weights().values()), uninterrupted.main_weights()))

    first = build_training(config(parallel, model))
    losses = [first.step(i) for i in range(3)]
    path = save(first, root, 3)
    resumed = build_training(config(parallel, model), seed=99)
    assert load(resumed, path) == {"step": 3}
    losses += [resumed.step(i) for i in (3, 4)]
    results.append((losses, list(resumed.weights().values()), resumed.main_weights()))
    return results


@pytest.mark.parametrize(
    "parallel, model",
    [
        (EXPERT, {}),
        (EXPERT | DISTRIBUTED, {"dtype": "bf16"}),
        (DISTRIBUTED, {}),
    ],
)
def test_resuming_on_two_ranks_is_bit_for_bit_a_run_that_never_stopped(parallel, model, tmp_path):
    by_rank = run_on_ranks(2, resume, parallel, model, str(tmp_path))
    for straight, resumed in by_rank:
        assert len(set(straight[0])) == 5
        assert resumed[0] == straight[0]
        for mine, other in zip(resumed[1] + resumed[2], straight[1] + straight[2], strict=True):
            assert torch.equal(mine, other)
    assert by_rank[0][0][0] != by_rank[1][0][0]  # the ranks have seen different data


def train_and_save(parallel, model, root):
    """On a rank: logits of fixed tokens after three steps, whose checkpoint is left behind."""
    training = build_training(config(parallel, model))
    for number in range(3):
        training.step(number)
    save(training, root, 3)
    return training.logits()


def weights_only(parallel, model, root):
    """On a rank: logits of fixed tokens with the weights of the newest checkpoint."""
    from megatron_rl.checkpoint.restore import load_weights

    training = build_training(config(parallel, model), seed=99)
    arguments = training.for_checkpoint()
    del arguments["optimizer"], arguments["layout"]
    load_weights(Path(root), **arguments)
    return training.logits()


def load_and_save_again(parallel, model, root):
    """On a rank: read the checkpoint of step 3 at this layout and write what was read as step 4."""
    training = build_training(config(parallel, model), seed=99)
    load(training, Path(root) / "step_3")
    save(training, root, 4)


def whole_tensors(root):
    """On one rank: {key: tensor} of the checkpoints of step 3 and of step 4."""
    from megatron.core import dist_checkpointing

    return [
        dist_checkpointing.load_plain_tensors(str(Path(root) / f"step_{step}" / "shards"))
        for step in (3, 4)
    ]


def test_weights_of_two_expert_parallel_ranks_give_one_rank_the_same_logits(tmp_path):
    on_two = run_on_ranks(2, train_and_save, EXPERT, {}, str(tmp_path))
    (on_one,) = run_on_ranks(1, weights_only, {}, {}, str(tmp_path))
    assert torch.equal(on_two[0], on_two[1])
    assert torch.equal(on_one, on_two[0])


@pytest.mark.parametrize(
    "model, num_ranks, parallel",
    [
        ({}, 1, {}),
        ({"dtype": "bf16"}, 2, {"tensor": 2}),
        ({"dtype": "bf16", "tie_embeddings": True}, 2, {"pipeline": 2} | DISTRIBUTED),
    ],
)
def test_weights_and_optimizer_state_are_relaid_without_changing_a_bit(
    model, num_ranks, parallel, tmp_path
):
    run_on_ranks(2, train_and_save, EXPERT | DISTRIBUTED, model, str(tmp_path))
    run_on_ranks(num_ranks, load_and_save_again, parallel, model, str(tmp_path))
    ((before, after),) = run_on_ranks(1, whole_tensors, str(tmp_path))
    assert before.keys() == after.keys()
    assert {"param" in key.split(".") for key in before} == {False, "dtype" in model}
    for key, tensor in before.items():
        assert tensor.abs().sum() > 0, key
        assert torch.equal(after[key], tensor), key


def resume_elsewhere(parallel, root):
    """On a rank: the next two losses after resuming from step 3."""
    training = build_training(config(parallel), seed=99)
    load(training, Path(root) / "step_3")
    return [training.step(i) for i in (3, 4)]


def test_training_goes_on_alike_with_experts_spread_otherwise(tmp_path):
    run_on_ranks(2, train_and_save, EXPERT, {}, str(tmp_path))
    same = run_on_ranks(2, resume_elsewhere, EXPERT, str(tmp_path))
    other = run_on_ranks(2, resume_elsewhere, DISTRIBUTED, str(tmp_path))
    for mine, theirs in zip(other, same, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def fail_on_rank_one():
    """On a rank: what the ranks hear of a disk that is full on rank 1."""
    import torch.distributed as dist

    from megatron_rl.parallel.collective_try import collective_try

    def write():
        if dist.get_rank() == 1:
            raise OSError("disk full")
        return dist.get_rank()

    try:
        collective_try(dist.group.WORLD, write)
    except OSError as error:
        return str(error)


def test_what_fails_on_one_rank_is_raised_on_all():
    assert run_on_ranks(2, fail_on_rank_one) == ["rank 1: disk full", "disk full"]


def test_a_file_damaged_in_the_share_of_another_rank_stops_all(tmp_path):
    run_on_ranks(2, train_and_save, EXPERT, {}, str(tmp_path))
    file = tmp_path / "step_3" / "shards" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(RankFailure) as failure:
        run_on_ranks(2, load_and_save_again, EXPERT, {}, str(tmp_path))
    assert str(failure.value).count(f"Damaged: {file} has SHA-256") == 2
