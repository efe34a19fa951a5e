"""The runs of a study: their order, configurations, identities and directories; mistakes."""

import re
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.study.plan import flat, make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import lay_out as lay_out_run
from megatron_rl.study.state import mark_done, mark_failed, state_of
from tests.support.stand_in_study import lay_out

ARMS = "arms: {a: {algorithm.name: gmpo}, b: {algorithm: {name: rspo}}}\nseeds: 2\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(folder, text, quick=False):
    lay_out(folder, text)
    return make_plan(read_study(Path("study.yaml")), quick)


def digests(folder, text):
    return [run.digest for run in planned(folder, text).runs]


def test_all_arms_of_a_seed_come_before_the_next_seed(folder):
    plan = planned(folder, ARMS.replace("seeds: 2", "seeds: [7, 3]"))
    assert [(run.index, run.arm, run.seed) for run in plan.runs] == [
        *((0, "a", 7), (1, "b", 7)),
        *((2, "a", 3), (3, "b", 3)),
    ]
    first = plan.runs[0]
    assert first.run_dir == Path(f"out/runs/a/seed_7-{first.digest[:8]}")
    assert re.fullmatch("[0-9a-f]{64}", first.digest)
    assert [run.config.seed for run in plan.runs] == [7, 7, 3, 3]
    assert [run.config.algorithm.name for run in plan.runs] == ["gmpo", "rspo", "gmpo", "rspo"]
    assert {run.config.device.threads for run in plan.runs} == {1}
    assert {run.name for run in plan.runs} >= {"a seed 7", "b seed 3"}


def test_overrides_win_over_the_base_and_an_arms_over_the_studys(folder):
    text = "overrides: {train.steps: 9, optimizer: {lr: 0.5}}\nthreads: 2\n"
    plan = planned(folder, f"{text}arms: {{a: {{optimizer.lr: 0.25}}, b: {{}}}}\nseeds: 1\n")
    assert [run.config.optimizer.lr for run in plan.runs] == [0.25, 0.5]
    assert {(run.steps, run.config.device.threads) for run in plan.runs} == {(9, 2)}


def test_overrides_are_nested_or_dotted():
    nested = {"algorithm": {"name": "gmpo", "router_shift": {"floor": 0.9}}, "train.steps": 3}
    assert dict(flat(nested)) == {
        "algorithm.name": "gmpo",
        "algorithm.router_shift.floor": 0.9,
        "train.steps": 3,
    }
    # a mapping for a field that takes one is its value; a dotted name is an entry of it
    assert dict(flat({"algorithm": {"settings": {"clip_low": 0.2}}})) == {
        "algorithm.settings": {"clip_low": 0.2}
    }
    assert dict(flat({"algorithm.settings.clip_low": 0.2})) == {"algorithm.settings.clip_low": 0.2}


def test_the_identity_follows_what_is_trained_and_measured(folder):
    base = digests(folder, ARMS)
    assert len(set(base)) == 4
    silent = "overrides: {observe.tensorboard: false, checkpoint.every: 3, device.kind: cpu}\n"
    assert digests(folder, ARMS + silent) == base
    assert digests(folder, ARMS.replace("{a:", "{renamed:")) == base
    for key in ("train.steps: 7", "optimizer.lr: 0.1", "rollout.temperature: 0.5"):
        assert not set(digests(folder, f"{ARMS}overrides: {{{key}}}\n")) & set(base)
    more = digests(folder, ARMS.replace("seeds: 2", "seeds: 3"))
    assert more[:4] == base  # a study that gets more seeds keeps its runs


def test_the_runs_of_a_renamed_arm_go_on_where_they_began(folder):
    first = planned(folder, ARMS).runs
    for run in first[:2]:  # of seed 1: a is done, b has failed
        lay_out_run(run)
    mark_done(first[0])
    mark_failed(first[1], "the disk is odd")
    swapped = ARMS.replace("a:", "x:").replace("b:", "a:").replace("x:", "b:")
    for text, arms in (
        (ARMS.replace("a:", "renamed:"), ["renamed", "b"]),
        (swapped, ["b", "a"]),  # the other's name
    ):
        runs = planned(folder, text).runs
        assert [run.arm for run in runs] == arms * 2
        assert [run.run_dir for run in runs[:2]] == [run.run_dir for run in first[:2]]
        assert [state_of(run).kind for run in runs] == ["done", "failed", "waiting", "waiting"]
        # of seed 2 none has begun
        assert runs[2].run_dir == Path(f"out/runs/{arms[0]}/seed_2-{first[2].digest[:8]}")
    quick = planned(folder, ARMS.replace("a:", "renamed:"), quick=True).runs
    assert {run.run_dir.parts[1] for run in quick} == {"quick"}


def test_paths_of_the_study_are_read_as_those_of_a_configuration(folder, monkeypatch):
    monkeypatch.setenv("PLACE", str(folder))
    lay_out(folder, ARMS + "prepare: {warm: {config: '${PLACE}/base.yaml'}}\n")
    text = Path("study.yaml").read_text()
    Path("study.yaml").write_text(text.replace("out", "$PLACE/out").replace(": base", ": ~/base"))
    monkeypatch.setenv("HOME", str(folder))
    study = read_study(Path("study.yaml"))
    assert (study.study_dir, study.base) == (folder / "out", folder / "base.yaml")
    assert study.prepare["warm"].config == folder / "base.yaml"
    Path("study.yaml").write_text(text.replace("base.yaml", '"a\\0b"'))
    with pytest.raises(UserError, match=r"^study.yaml: base is 'a\\x00b'; expected a path$"):
        read_study(Path("study.yaml"))


def prepared(steps, more=""):
    stage = f"{{config: base.yaml, overrides: {{train.steps: {steps}}}{more}}}"
    return f"prepare: {{warm: {stage}}}\nstart_from: warm\n{ARMS}"


def test_arms_start_from_the_prepared_run(folder):
    plan = planned(folder, prepared(4))
    warm, *arms = plan.runs
    assert (warm.verb, warm.prepared, warm.seed, warm.steps) == ("sft", True, None, 4)
    assert warm.run_dir == Path(f"out/prepare/warm-{warm.digest[:8]}")
    assert {run.config.checkpoint.init_from for run in arms} == {warm.run_dir}
    assert {run.needs for run in arms} == {0} and warm.needs is None
    assert {run.config.optimizer.lr for run in arms} == {1e-6}  # the default from trained weights


def test_another_prepared_run_makes_other_arms(folder):
    assert not set(digests(folder, prepared(4))) & set(digests(folder, prepared(5)))


def test_the_prepared_run_counts_by_its_content_not_by_its_place(folder):
    before = digests(folder, prepared(4))
    text = (folder / "study.yaml").read_text().replace("study_dir: out", "study_dir: elsewhere")
    (folder / "study.yaml").write_text(text)
    assert [run.digest for run in make_plan(read_study(Path("study.yaml"))).runs] == before


def test_a_prepared_run_for_each_seed(folder):
    plan = planned(folder, prepared(4, ", each_seed: true"))
    assert [(run.name, run.needs) for run in plan.runs] == [
        *(("prepare warm seed 1", None), ("prepare warm seed 2", None)),
        *(("a seed 1", 0), ("b seed 1", 0), ("a seed 2", 1), ("b seed 2", 1)),
    ]
    assert plan.runs[5].config.checkpoint.init_from == plan.runs[1].run_dir


def test_quick_scales_and_overrides(folder):
    quick = "quick: {seeds: 1, steps: 0.5, overrides: {rollout.prompts_per_step: 4}}\n"
    plan = planned(folder, f"{prepared(5)}{quick}", quick=True)
    assert [(run.name, run.steps) for run in plan.runs] == [
        *(("prepare warm", 2), ("a seed 1", 3), ("b seed 1", 3)),
    ]
    assert {run.config.rollout.prompts_per_step for run in plan.runs} == {4}
    assert plan.folder == Path("out/quick")
    assert plan.runs[1].run_dir.parent == Path("out/quick/runs/a")


def test_a_sweep_adds_arms(folder):
    text = "arms: {a: {}}\nseeds: 1\nsweep: {over: {optimizer.lr: [0.1, 0.2]}}\n"
    plan = planned(folder, text)
    assert plan.arms == ("a", "lr=0.1", "lr=0.2")
    assert [run.config.optimizer.lr for run in plan.runs][1:] == [0.1, 0.2]


def test_an_arm_has_seeds_of_its_own(folder):
    own = ARMS.replace("seeds: 2", "seeds: [5, 6]\nseeds_of: {b: [6, 9, 5]}")
    plan = planned(folder, own)
    assert [(run.arm, run.seed) for run in plan.runs] == [
        *(("a", 5), ("b", 5), ("a", 6), ("b", 6), ("b", 9)),
    ]
    assert plan.seeds == (5, 6, 9)
    same = planned(folder, ARMS.replace("seeds: 2", "seeds: [5, 6, 9]"))
    assert {run.digest for run in plan.runs} < {run.digest for run in same.runs}


def test_quick_takes_some_arms_and_the_first_seeds_of_each(folder):
    text = ARMS.replace("seeds: 2", "seeds: 3\nseeds_of: {b: [8, 1, 4]}")
    plan = planned(folder, f"{text}quick: {{seeds: 2, arms: [b], steps: 1.0}}\n", quick=True)
    assert [(run.arm, run.seed) for run in plan.runs] == [("b", 8), ("b", 1)]
    assert plan.arms == ("b",)


MISTAKES = {
    "no arms": ("seeds: 1\n", "the study has no arms; expected at least one"),
    "a name": ("arms: {'../x': {}}\n", "the name '../x' in arm is no folder's; expected up to 80"),
    "an unknown key": (
        "arms: {a: {algorithm.nam: gmpo}}\n",
        "arm a: unknown key --algorithm.nam (did you mean algorithm.name?)",
    ),
    "a wrong value": (
        "arms: {a: {}, b: {train.steps: 0.5}}\n",
        "arm b: --train.steps is 0.5; expected an integer, at least 1",
    ),
    "a rule": ("arms: {a: {algorithm.name: gmop}}\n", "arm a: "),
    "the seed": ("arms: {a: {seed: 3}}\n", "arm a sets seed, which the study gives"),
    "the directory": ("arms: {a: {}}\noverrides: {run_dir: x}\n", "arm a sets run_dir, which"),
    "a comparison": (
        "arms: {gmpo: {}}\ncompare_to: gmop\n",
        "compare_to is 'gmop' (did you mean gmpo?); expected one of gmpo",
    ),
    "a start": (
        "arms: {a: {}}\nstart_from: warm\n",
        "start_from is 'warm'; expected one of prepare, which is empty",
    ),
    "the same arm twice": (
        "arms: {a: {}, b: {optimizer.beta2: 0.95}}\n",
        "arms a and b have the same configuration; expected arms that differ",
    ),
    "seeds twice": ("arms: {a: {}}\nseeds: [1, 1]\n", "seeds is [1, 1]; expected one or more"),
    "many seeds twice, cut": (
        f"arms: {{a: {{}}}}\nseeds: {[1] * 999}\n",
        f"seeds is [{'1, ' * 25}1...; expected one or more",
    ),
    "an arm's seeds twice": (
        "arms: {a: {}}\nseeds_of: {a: [2, 2]}\n",
        "seeds_of.a is [2, 2]; expected one or more",
    ),
    "seeds of no arm": (
        "arms: {rspo: {}}\nseeds_of: {rsp: 3}\n",
        "seeds_of names 'rsp' (did you mean rspo?); expected arms: rspo",
    ),
    "a quick arm": (
        "arms: {rspo: {}}\nquick: {arms: [gmpo]}\n",
        "quick.arms names 'gmpo'; expected arms: rspo",
    ),
    "no seeds": ("arms: {a: {}}\nseeds: []\n", "seeds is []; expected one or more"),
    "a missing file": (
        "arms: {a: {data.eval: none.jsonl}}\n",
        "arm a: data.eval: none.jsonl does not exist; expected a path from the current directory",
    ),
    "an arm of the sweep": (
        "arms: {lr=0.1: {}}\nsweep: {over: {optimizer.lr: [0.1]}}\n",
        "arms.lr=0.1 is also an arm of the sweep",
    ),
    "a key of the study": (
        "arms: {a: {}}\nseed: 3\n",
        "study.yaml: study.seed is no setting of a study (did you mean seeds?)",
    ),
    "a value of the study": ("arms: {a: {}}\nat_once: 0\n", "study.yaml: study.at_once is 0"),
}


@pytest.mark.parametrize("text, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(folder, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        planned(folder, text)


def test_quick_needs_the_arm_it_compares_with(folder):
    with pytest.raises(UserError, match="quick.arms lacks a, the arm of compare_to"):
        planned(folder, ARMS + "compare_to: a\nquick: {arms: [b]}\n", quick=True)


def test_runs_must_be_able_to_resume(folder):
    lay_out(folder, ARMS)
    with (folder / "base.yaml").open("a") as file:
        file.write("checkpoint: {resume: never}\n")
    with pytest.raises(UserError, match="arm a: checkpoint.resume is never; expected auto"):
        make_plan(read_study(Path("study.yaml")))
