"""Saving, resuming and refusing, in one process."""

import json
import threading
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint.directory import newest_checkpoint
from megatron_rl.errors import UserError
from tests.support.tiny import cpu_device, tiny_config
from tests.support.tiny_training import build_training

PLAIN = tiny_config()
VARIANTS = {
    "fp32": PLAIN,
    "fp32 distributed optimizer": tiny_config(parallel={"distributed_optimizer": True}),
    "bf16": tiny_config(model={"dtype": "bf16"}),
    "bf16 distributed optimizer": tiny_config(
        model={"dtype": "bf16"}, parallel={"distributed_optimizer": True}
    ),
    "expert bias, tied embeddings, dense layer": tiny_config(
        model={
            "router_score": "sigmoid",
            "router_expert_bias": True,
            "expert_bias_update_rate": 0.05,
            "tie_embeddings": True,
            "moe_layer_freq": [0, 1],
            "shared_expert_ffn_hidden_size": 16,
        }
    ),
    "frozen router": tiny_config(model={"freeze_router": True}),
    "muon": tiny_config(optimizer={"name": "muon"}),
    "muon in bf16": tiny_config(optimizer={"name": "muon"}, model={"dtype": "bf16"}),
    # Others that are not ours: a count of its own for each parameter; no state at all.
    "RMSprop in bf16": tiny_config(
        optimizer={"name": "torch.optim:RMSprop"}, model={"dtype": "bf16"}
    ),
    "SGD": tiny_config(optimizer={"name": "torch.optim:SGD"}),
}
STATE = {"cursor": {"epoch": 1, "position": 30}, "scheduler": [0.1, None], "name": "läuft"}


@pytest.fixture(autouse=True, scope="module")
def prepared():
    """Megatron has to be imported after the CPU is prepared for it."""
    cpu_device()


def save(training, root, step=3, keep=2, **changes):
    from megatron_rl.checkpoint.save import save_checkpoint

    arguments = {**training.for_checkpoint(), "state": STATE, **changes}
    return save_checkpoint(Path(root), step, keep=keep, **arguments)


def load(training, path, **changes):
    from megatron_rl.checkpoint.restore import load_checkpoint

    return load_checkpoint(path, **{**training.for_checkpoint(), **changes})


def load_weights(training, path, **changes):
    from megatron_rl.checkpoint.restore import load_weights

    arguments = {**training.for_checkpoint(), **changes}
    del arguments["optimizer"], arguments["layout"]
    return load_weights(path, **arguments)


def all_equal(left, right):
    assert len(left) == len(right) > 0
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ["fp32", "bf16 distributed optimizer"])
def test_the_settings_of_adam_are_not_those_of_the_checkpoint(name, tmp_path):
    """Rate, weight decay, betas and epsilon stay as the optimizer was built with them."""
    first = build_training(VARIANTS[name])
    first.step(0)
    path = save(first, tmp_path)
    second = build_training(VARIANTS[name])
    other = {"lr": 0.5, "weight_decay": 0.25, "betas": (0.1, 0.2), "eps": 1e-3}
    other |= {"max_lr": 0.5, "min_lr": 0.125}
    for group in second.optimizer.param_groups:
        assert all(group[name] != value for name, value in other.items())
        group.update(other)
    load(second, path)
    for group in second.optimizer.param_groups:
        assert {name: group[name] for name in other} == other
    assert all_equal(second.main_weights(), first.main_weights())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_resuming_is_bit_for_bit_the_run_that_never_stopped(config, tmp_path):
    uninterrupted = build_training(config)
    expected = [uninterrupted.step(i) for i in range(6)]
    assert len(set(expected)) == 6

    first = build_training(config)
    assert [first.step(i) for i in range(3)] == expected[:3]
    path = save(first, tmp_path)
    next_random = torch.rand(4)
    assert [first.step(i) for i in range(3, 6)] == expected[3:]  # saving has disturbed nothing

    resumed = build_training(config, seed=99)
    torch.manual_seed(5)
    assert load(resumed, path) == STATE
    assert torch.equal(torch.rand(4), next_random)
    assert [resumed.step(i) for i in range(3, 6)] == expected[3:]
    assert all_equal(resumed.main_weights(), uninterrupted.main_weights())
    assert all_equal(list(resumed.weights().values()), list(uninterrupted.weights().values()))
    assert torch.equal(resumed.logits(), uninterrupted.logits())


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16 distributed optimizer"])
def test_what_is_written_in_the_background_is_the_moment_of_the_save(name, tmp_path, monkeypatch):
    """The writer waits until training is three steps on, and has then written the old state."""
    from megatron_rl.checkpoint import torch_dist
    from megatron_rl.checkpoint.background import BackgroundWriter

    trained_on, write = threading.Event(), torch_dist.InProcessSave.write

    def write_late(self, group):
        assert trained_on.wait(60)
        write(self, group)

    monkeypatch.setattr(torch_dist.InProcessSave, "write", write_late)
    training, background = build_training(VARIANTS[name]), BackgroundWriter()
    for number in range(3):
        training.step(number)
    path = save(training, tmp_path, background=background)
    next_random = torch.rand(4)
    assert background.busy and newest_checkpoint(tmp_path) is None
    with pytest.raises(RuntimeError, match="has not been waited for"):
        background.start(lambda group: None)
    expected = [training.step(i) for i in range(3, 6)]
    trained_on.set()
    background.wait()
    assert not background.busy and newest_checkpoint(tmp_path) == path
    resumed = build_training(VARIANTS[name], seed=99)
    assert load(resumed, path) == STATE
    assert torch.equal(torch.rand(4), next_random)
    assert [resumed.step(i) for i in range(3, 6)] == expected
    assert all_equal(resumed.main_weights(), training.main_weights())


@pytest.mark.parametrize("failure", [OSError("disk full"), RuntimeError("a rank is lost")])
def test_what_goes_wrong_in_the_background_is_raised_when_it_is_waited_for(failure):
    from megatron_rl.checkpoint.background import BackgroundWriter

    def write(group):
        raise failure

    build_training(PLAIN)
    background = BackgroundWriter()
    background.start(write)
    with pytest.raises(type(failure), match=str(failure)):
        background.wait()
    background.wait()  # once


@pytest.mark.parametrize("name", ["fp32", "bf16 distributed optimizer", "muon in bf16"])
def test_a_checkpoint_of_an_untrained_model_resumes(name, tmp_path):
    untrained = build_training(VARIANTS[name])
    path = save(untrained, tmp_path, step=0)
    resumed = build_training(VARIANTS[name], seed=99)
    load(resumed, path)
    assert [resumed.step(i) for i in range(2)] == [untrained.step(i) for i in range(2)]


def test_what_muon_keeps_is_in_the_checkpoint_and_the_count_goes_on(tmp_path):
    from megatron.core import dist_checkpointing

    training = build_training(VARIANTS["muon"])
    for number in range(3):
        training.step(number)
    path = save(training, tmp_path)
    assert json.loads((path / "manifest.json").read_text())["optimizer_step"] == 3
    stored = dist_checkpointing.load_plain_tensors(str(path / "shards"))
    names = {key.removeprefix("optimizer.state.").partition(".")[0] for key in stored}
    assert names >= {"momentum", "exp_avg", "exp_avg_sq"}
    kept = [key for key in stored if key.startswith("optimizer.state.momentum.")]
    assert kept and all(stored[key].abs().sum() > 0 for key in kept)
    assert not any("router" in key or "embedding" in key for key in kept)
    resumed = build_training(VARIANTS["muon"], seed=99)
    load(resumed, path)
    assert {group["step"] for group in resumed.optimizer.param_groups} == {3}


def test_the_state_of_another_optimizer_is_refused_in_one_line(tmp_path):
    training = build_training(PLAIN)
    training.step(0)
    path = save(training, tmp_path)
    with pytest.raises(UserError, match="does not hold what model and optimizer need") as error:
        load(build_training(VARIANTS["muon"]), path)
    assert "\n" not in str(error.value)


def test_bf16_main_weights_are_not_the_rounded_ones(tmp_path):
    training = build_training(VARIANTS["bf16"])
    training.step(0)
    path = save(training, tmp_path)
    resumed = build_training(VARIANTS["bf16"], seed=99)
    load(resumed, path)
    assert all_equal(resumed.main_weights(), training.main_weights())
    assert any(
        not torch.equal(weight, weight.bfloat16().float()) for weight in resumed.main_weights()
    )


def test_a_checkpoint_loads_with_the_other_kind_of_optimizer(tmp_path):
    training = build_training(VARIANTS["bf16 distributed optimizer"])
    for number in range(2):
        training.step(number)
    path = save(training, tmp_path)
    resumed = build_training(VARIANTS["bf16"], seed=99)
    load(resumed, path)
    assert [resumed.step(i) for i in (2, 3)] == [training.step(i) for i in (2, 3)]


def test_megatrons_random_states_come_back(tmp_path):
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    training = build_training(PLAIN)
    path = save(training, tmp_path)
    stored = get_cuda_rng_tracker().get_states()
    resumed = build_training(PLAIN, seed=99)
    assert not torch.equal(
        get_cuda_rng_tracker().get_states()["model-parallel-rng"], stored["model-parallel-rng"]
    )
    load(resumed, path)
    restored = get_cuda_rng_tracker().get_states()
    assert restored.keys() == stored.keys() >= {"model-parallel-rng"}
    assert all(torch.equal(restored[name], stored[name]) for name in stored)


def test_the_random_states_of_another_kind_of_device_are_left_alone(tmp_path):
    """CUDA's states are of 16 bytes, the CPU's of 5056."""
    build_training(PLAIN)
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_rl.checkpoint.random_state import load_random_state, save_random_state

    torch.manual_seed(5)
    save_random_state(tmp_path / "rank_0.pt")
    state = torch.load(tmp_path / "rank_0.pt", weights_only=True)
    of_cuda = torch.zeros(16, dtype=torch.uint8)
    state["megatron"] = dict.fromkeys(state["megatron"], of_cuda)
    torch.save({**state, "cuda": of_cuda}, tmp_path / "rank_0.pt")
    expected, kept = torch.rand(2), dict(get_cuda_rng_tracker().get_states())
    load_random_state(tmp_path / "rank_0.pt")
    assert torch.equal(torch.rand(2), expected)
    found = get_cuda_rng_tracker().get_states()
    assert found.keys() == kept.keys() and all(torch.equal(found[n], kept[n]) for n in kept)


def test_the_random_state_of_another_layout_is_left_alone(tmp_path):
    training = build_training(PLAIN)
    path = save(training, tmp_path)
    layout = {**training.for_checkpoint()["layout"], "expert": 2}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    load(training, path, layout=layout)
    assert torch.equal(torch.rand(2), expected)


def test_the_directory_holds_what_it_should_and_no_process_was_started(tmp_path):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    training = build_training(PLAIN)
    training.step(0)
    path = save(training, tmp_path / "checkpoints", step=7)
    assert path == tmp_path / "checkpoints" / "step_7" == newest_checkpoint(path.parent)
    manifest = json.loads((path / "manifest.json").read_text())
    stored = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert stored == {*manifest["files"], "manifest.json"}
    assert stored >= {"state.json", "random/rank_0.pt", "shards/__0_0.distcp", "shards/.metadata"}
    assert (manifest["step"], manifest["optimizer_step"]) == (7, 1)
    assert manifest["layout"]["world_size"] == 1
    assert manifest["architecture"]["hidden_size"] == 32
    torch.load(path / "random" / "rank_0.pt", weights_only=True)
    assert filesystem_async._results_queue is None


def test_old_checkpoints_and_leftovers_go(tmp_path):
    training = build_training(PLAIN)
    (tmp_path / ".step_9.partial" / "shards").mkdir(parents=True)
    for step in (1, 2, 3):
        save(training, tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_2", "step_3"]


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_before_publishing_leaves_the_old_newest(tmp_path, monkeypatch):
    from megatron_rl.checkpoint import save as saving

    training = build_training(PLAIN)
    training.step(0)
    old = save(training, tmp_path, 1)
    weights = training.weights()
    training.step(1)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saving, "publish", killed)
        with pytest.raises(Killed):
            save(training, tmp_path, 2)
    assert (tmp_path / ".step_2.partial" / "manifest.json").is_file()
    assert newest_checkpoint(tmp_path) == old
    load(training, old)
    assert all_equal(list(training.weights().values()), list(weights.values()))
    save(training, tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save(build_training(PLAIN), tmp_path / "root", state={"cursor": object()})
    assert not (tmp_path / "root").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(training, run directory) with checkpoints of steps 1 and 2."""
    training = build_training(PLAIN)
    run = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        training.step(step)
        save(training, run / "checkpoints", step)
    return training, run


def test_weights_are_found_from_a_run_its_checkpoints_or_a_step(saved):
    training, run = saved
    expected, root = training.logits(), run / "checkpoints"
    for path in (run, root, root / "step_2"):
        other = build_training(PLAIN, seed=99)
        assert not torch.equal(other.logits(), expected)
        assert load_weights(other, path) == root / "step_2"
        assert torch.equal(other.logits(), expected)
    assert load_weights(other, root / "step_1") == root / "step_1"
    assert not torch.equal(other.logits(), expected)
    with pytest.raises(UserError, match="does not exist"):
        load_weights(other, run / "elsewhere")


def test_weights_load_in_the_models_own_dtype(saved):
    training, run = saved
    other = build_training(VARIANTS["bf16"], seed=99)
    load_weights(other, run)
    other.optimizer.reload_model_params()
    for name, weight in training.weights().items():
        assert torch.equal(other.weights()[name], weight.bfloat16())
    assert all(torch.equal(w, w.bfloat16().float()) for w in other.main_weights())


@pytest.mark.parametrize("field, value", [("moe_ffn_hidden_size", 16), ("rope_base", 500.0)])
@pytest.mark.parametrize("loading", [load, load_weights])
def test_another_architecture_is_refused_with_the_fields_name(saved, loading, field, value):
    training, run = saved
    other = build_training(tiny_config(model={field: value}))
    before = other.weights()
    with pytest.raises(UserError, match=f"{field} .*; .*{field} {value}; use ") as error:
        loading(other, run / "checkpoints" / "step_2")
    assert "\n" not in str(error.value)
    assert all_equal(list(other.weights().values()), list(before.values()))


def test_resuming_in_another_dtype_is_refused(saved):
    _, run = saved
    with pytest.raises(UserError, match="dtype fp32; .* dtype bf16; "):
        load(build_training(VARIANTS["bf16"]), run / "checkpoints" / "step_2")


def test_a_checkpoint_without_optimizer_gives_weights_but_does_not_resume(tmp_path):
    training = build_training(PLAIN)
    path = save(training, tmp_path, optimizer=None)
    other = build_training(PLAIN, seed=99)
    with pytest.raises(UserError, match="holds weights only; .*; .*init_from"):
        load(other, path)
    assert load(other, path, optimizer=None) == STATE
    assert torch.equal(other.logits(), training.logits())


def test_a_parameter_without_stored_state_is_named(tmp_path):
    path = save(build_training(VARIANTS["frozen router"]), tmp_path)
    with pytest.raises(UserError, match=r"optimizer\.state\.exp_avg.*router.*; .*; ") as error:
        load(build_training(PLAIN), path)
    assert "\n" not in str(error.value)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "damage, words", [(flip_byte, "SHA-256"), (cut, "bytes"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("file", ["shards/__0_0.distcp", "shards/.metadata", "state.json"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(tmp_path, damage, words, file):
    training = build_training(PLAIN)
    path = save(training, tmp_path)
    damage(path / file)
    other = build_training(PLAIN, seed=99)
    before = other.weights()
    for loading in (load, load_weights):
        with pytest.raises(UserError, match=f"{path / file} .*{words}.*; .*manifest.*; ") as error:
            loading(other, path)
        assert "\n" not in str(error.value)
    assert all_equal(list(other.weights().values()), list(before.values()))


def interrupted_by(error, method):
    """torch's reader or writer of shards, which meets an error on the way."""
    from unittest import mock

    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

    owner = FileSystemWriter if method.startswith("write") else FileSystemReader
    return mock.patch.object(owner, method, side_effect=error)


def test_ctrl_c_in_a_save_is_ctrl_c_and_publishes_nothing(tmp_path):
    training = build_training(PLAIN)
    save(training, tmp_path, 1)
    with interrupted_by(KeyboardInterrupt(), "write_data"), pytest.raises(KeyboardInterrupt):
        save(training, tmp_path, 2)
    assert newest_checkpoint(tmp_path).name == "step_1"
    save(training, tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]


@pytest.mark.parametrize(
    "error, raised",
    [(OSError(28, "No space left"), OSError), (RuntimeError("iostream error"), OSError)],
)
def test_what_a_disk_says_in_a_save_is_the_disks(tmp_path, error, raised):
    with interrupted_by(error, "write_data"), pytest.raises(raised, match="could not be written"):
        save(build_training(PLAIN), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_the_program_in_a_save_is_not_called_the_disks(tmp_path):
    with interrupted_by(KeyError("x"), "write_data"):
        with pytest.raises(RuntimeError, match=r"a checkpoint failed: KeyError\('x'\)"):
            save(build_training(PLAIN), tmp_path)


def test_ctrl_c_while_a_checkpoint_is_read_is_ctrl_c(tmp_path):
    training = build_training(PLAIN)
    path = save(training, tmp_path)
    with interrupted_by(KeyboardInterrupt(), "read_data"), pytest.raises(KeyboardInterrupt):
        load(training, path)


def test_ctrl_c_and_faults_while_single_tensors_are_read(tmp_path):
    from megatron_rl.checkpoint.torch_dist import StoredTensors

    stored = StoredTensors(save(build_training(PLAIN), tmp_path, 1) / "shards")
    key = min(stored.shapes)
    with interrupted_by(KeyboardInterrupt(), "read_data"), pytest.raises(KeyboardInterrupt):
        stored.get(key)
    with interrupted_by(OSError(5, "Input/output error"), "read_data"):
        with pytest.raises(UserError) as error:
            stored.get(key)
    assert str(error.value) == (
        f"{key} of {tmp_path}/step_1/shards cannot be read ([Errno 5] Input/output error); "
        "expected what was written; restore its files from a copy"
    )
    assert stored.get(key).shape == stored.shapes[key]


def test_what_others_left_in_the_place_of_leftovers_is_no_obstacle(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("keep me")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".step_1.partial").symlink_to(mine)
    (tmp_path / "root" / ".step_7.deleted").write_text("a file")
    path = save(build_training(PLAIN), tmp_path / "root", 1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step_1"]
    assert not path.is_symlink() and (mine / "file").read_text() == "keep me"
