"""What a run may go on with: its data, verb, seed and reference; and what it says has changed."""

import hashlib
import json

import numpy as np
import pytest

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.observe.configurations import keep_configuration
from megatron_rl.records import Prompt, Sample
from tests.support.tiny import cpu_device


@pytest.fixture(autouse=True, scope="module")
def prepared():
    """Megatron has to be imported after the CPU is prepared for it."""
    cpu_device()


def check_state(*arguments):
    from megatron_rl.run.continuation import check_state

    check_state(*arguments)


def what_differs(*arguments):
    from megatron_rl.run.continuation import what_differs

    return what_differs(*arguments)


def prompts(*targets):
    return [
        Prompt(i, np.array([1, 2]), "p", {"target": target}) for i, target in enumerate(targets)
    ]


SAMPLES = [Sample.of([1, 2], [3])]
TRAIN, HELD_OUT = prompts(3, 4, 5), prompts(8, 9)


@pytest.fixture
def config(tmp_path):
    """Of a run with a configuration, as it was until step 2."""
    made = Config(run_dir=tmp_path / "run", data={"train": tmp_path / "train.jsonl"})
    made.run_dir.mkdir()
    keep_configuration(made.run_dir, made, None)
    return made


def identity(config, verb="train", train=TRAIN, held_out=HELD_OUT):
    from megatron_rl.run.continuation import run_identity

    return run_identity(config, verb, train, held_out)


def state_of(config, **changed):
    """As a checkpoint of step 2 gives it back."""
    state = {"step": 2, "scheduler": {}, "task": {"prompts": {}}, "identity": identity(config)}
    return json.loads(json.dumps({**state, **changed}))


def refusal(config, state, now):
    with pytest.raises(UserError) as caught:
        check_state(config, "step_2", state, now)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(config, **sections):
    return Config(**{**config.model_dump(), **sections})


def test_the_same_may_go_on(config):
    check_state(config, "step_2", state_of(config), identity(config))
    assert what_differs(config, state_of(config), identity(config)) == ([], [])


def test_other_problems_in_as_many_lines_are_refused_by_name(config):
    message = refusal(config, state_of(config), identity(config, train=prompts(3, 4, 6)))
    assert message == (
        f"data.train {config.data.train} does not give what step_2 was trained on (3 as before, "
        "with other content); expected the same; restore file, tokenizer and keys, or go on with "
        "these with --checkpoint.changed_data accept, or start a new run from these weights: "
        "another run_dir, checkpoint.init_from step_2"
    )


def test_other_problems_are_taken_and_said_when_told_to(config):
    config = changed(config, checkpoint={"changed_data": "accept"})
    now = identity(config, train=prompts(3, 4, 6))
    check_state(config, "step_2", state_of(config), now)
    assert what_differs(config, state_of(config), now) == (
        [],
        [
            f"data.train {config.data.train} has changed (3 as before, with other content): "
            "going on with these"
        ],
    )


def test_other_held_out_problems_are_said(config):
    now = identity(config, held_out=prompts(8))
    check_state(config, "step_2", state_of(config), now)
    _, (warning,) = what_differs(config, state_of(config), now)
    assert warning == (
        "data.eval None has changed (2 then, 1 now): evaluations before and after cannot be "
        "compared"
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 3}, "seed was 1 in the run that wrote step_2 and is 3 now; expected the same; "),
        ({"data": {"shuffle": False}}, "data.shuffle was true in the run that wrote step_2 and is"),
    ],
)
def test_what_must_not_change_is_refused_with_both_values(config, sections, message):
    now = changed(config, **sections)
    found = refusal(now, state_of(config), identity(config))
    assert found.startswith(message)
    assert found.endswith(
        "new run from these weights: another run_dir, checkpoint.init_from step_2"
    )


def test_a_router_may_be_frozen_and_not_be_freed(config):
    """Its weights have no moments in the checkpoint."""
    frozen = changed(config, model={"freeze_router": True})
    check_state(frozen, "step_2", state_of(config), identity(config))
    keep_configuration(config.run_dir, frozen, 1)
    found = refusal(config, state_of(config), identity(config))
    assert found.startswith(
        "model.freeze_router was true in the run that wrote step_2 and is false"
    )


def test_what_may_change_is_said_key_by_key(config):
    now = changed(
        config,
        algorithm={"name": "grpo"},
        rollout={"temperature": 0.7},
        train={"steps": 4},
        device={"threads": 2},
        model={"head_dim": 32, "aux_loss_coeff": 0.1},
    )
    check_state(now, "step_2", state_of(config), identity(config))
    assert what_differs(now, state_of(config), identity(config)) == (
        [
            "changed since step 2:",
            "  model.head_dim null -> 32",  # what null comes to; the architecture is the same
            "  model.aux_loss_coeff 0.0 -> 0.1",
            "  rollout.temperature 1.0 -> 0.7",
            "  algorithm.name rspo -> grpo",
            "  train.steps 100 -> 4",
        ],
        [],
    )


@pytest.mark.parametrize("stored", [True, False])
def test_a_run_of_another_verb_is_refused(config, stored):
    now = identity(config, "sft", SAMPLES)
    state = state_of(config)
    if not stored:  # by an older version: its cursor tells
        del state["identity"]
    found = refusal(config, state, now)
    assert found.startswith(
        "step_2 is of a run of train; expected one of sft; use the verb train, "
    )


def test_a_checkpoint_of_an_older_version_is_taken_with_a_warning(config):
    state = state_of(config)
    del state["identity"]
    (config.run_dir / "config.yaml").unlink()
    (config.run_dir / "configs" / "step_0.yaml").unlink()
    check_state(config, "step_2", state, identity(config))
    notes, warnings = what_differs(config, state, identity(config))
    assert notes == []
    assert warnings[0].endswith("run holds no config.yaml: what has changed is not known")
    assert "whether data.train and data.eval still give the same is not known" in warnings[1]


def test_another_reference_is_refused(config, tmp_path):
    """The directory of a run is named, whose newest checkpoint is another one by now."""
    for number in (1, 2):
        manifest = tmp_path / "sft" / "checkpoints" / f"step_{number}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(str(number))
    config = changed(
        config,
        algorithm={"reference": "initial"},
        checkpoint={"init_from": tmp_path / "sft" / "checkpoints" / "step_1"},
    )
    keep_configuration(config.run_dir, config, None)
    state = state_of(config)
    check_state(config, "step_2", state, identity(config))
    now = changed(config, checkpoint={"init_from": tmp_path / "sft"})
    found = refusal(now, state, identity(now))
    step = tmp_path / "sft" / "checkpoints"
    assert found.startswith(
        f"algorithm.reference initial would be {step / 'step_2'} and was {step / 'step_1'} in the "
    )
    without = changed(now, algorithm={"reference": "none"})
    check_state(without, "step_2", state, identity(without))


def test_a_new_run_is_not_compared_with_what_lies_in_its_directory(config):
    from megatron_rl.run.continuation import check_continuation

    config = changed(config, seed=2)
    check_continuation(config, identity(config))  # no checkpoint
    write_checkpoint(config.run_dir, state_of(config))
    with pytest.raises(UserError, match="seed was 1 in the run that wrote .*step_2 and is 2 now"):
        check_continuation(config, identity(config))
    anew = changed(config, checkpoint={"resume": "never"})
    check_continuation(anew, identity(config))


def test_a_damaged_checkpoint_is_left_to_whoever_loads_it(config):
    """An older one may do, or the error be of the damage."""
    from megatron_rl.run.continuation import check_continuation

    config = changed(config, seed=2)
    checkpoint = write_checkpoint(config.run_dir, state_of(config))
    (checkpoint / "state.json").write_text("{")
    check_continuation(config, identity(config))
    (checkpoint / "state.json").unlink()
    check_continuation(config, identity(config))
    (checkpoint / "manifest.json").write_text("{")
    check_continuation(config, identity(config))


def test_another_architecture_is_refused_before_anything_is_loaded(config):
    from megatron_rl.run.continuation import check_continuation

    write_checkpoint(config.run_dir, state_of(config))
    other = changed(config, model={"dtype": "bf16"})
    with pytest.raises(UserError, match="dtype fp32; .* has dtype bf16; .*init_from .*step_2$"):
        check_continuation(other, identity(config))


def write_checkpoint(run_dir, state):
    """What of step 2's checkpoint says what it is of."""
    from megatron_rl.checkpoint.identity import architecture_of
    from megatron_rl.checkpoint.manifest import Manifest, write_manifest

    checkpoint = run_dir / "checkpoints" / "step_2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, Manifest(2, architecture_of(Config().model), {}, 2, {}, {}))
    return checkpoint


def test_changed_code_of_ones_own_is_said_and_not_refused(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(record, completion):\n    return None\n")
    name = f"{file}:mine"
    own = config.model_copy(update={"reward": config.reward.model_copy(update={"name": name})})
    keep_configuration(own.run_dir, own, None)
    state = state_of(own)
    assert list(state["identity"]["code"]) == [name]
    assert what_differs(own, state, identity(own)) == ([], [])
    file.write_text("def mine(record, completion):\n    return 1\n")
    check_state(own, "step_2", state, identity(own))
    notes, warnings = what_differs(own, state, identity(own))
    assert notes == []
    assert warnings == [f"the file of {name} has changed: going on with it as it is now"]
    del state["identity"]["code"]  # of a version that did not keep it
    assert what_differs(own, state, identity(own)) == ([], [])


def test_code_of_ones_own_is_found_without_listing_a_data_set_again(tmp_path):
    """Reading has listed it already; by then its files may even be gone."""
    from megatron_rl.config.own_code import own_code

    source = tmp_path / "mine.py"
    source.write_text("def records():\n    return [{'prompt': 'a'}]\n")
    (tmp_path / "shards").mkdir()  # empty
    reference = f"{source}:records"
    data = {"train": tmp_path / "shards", "eval": [{"path": reference}, {"path": "hf:a/b"}]}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert own_code(Config(data=data), "sft") == {reference: digest}


def test_so_is_a_changed_optimizer_of_ones_own(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\nmine = torch.optim.SGD\n")
    own = changed(config, optimizer={"name": f"{file}:mine"})
    for verb in ("train", "sft"):
        assert list(identity(own, verb)["code"]) == [f"{file}:mine"]


def test_another_optimizer_is_refused_and_another_setting_of_it_is_said(config):
    state = state_of(config)
    assert refusal(changed(config, optimizer={"name": "muon"}), state, identity(config)).startswith(
        "optimizer.name was adam in the run that wrote step_2 and is muon now; expected the same; "
    )
    other = changed(config, optimizer={"settings": {"beta1": 0.5}})
    check_state(other, "step_2", state, identity(other))
    notes, _ = what_differs(other, state, identity(other))
    assert notes == ["changed since step 2:", "  optimizer.settings.beta1 (not set) -> 0.5"]
