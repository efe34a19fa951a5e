"""Runs side by side: the table's numbers, one curve a run in its own place, and refusals."""

import json
import re

import pytest

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.observe.run_files import drop_after
from megatron_rl.report.comparison import write_comparison
from megatron_rl.report.run_page import write_report
from tests.support.pages import charts_of, data_of


def write_run(folder, name, lr, solved, norms, gammas):
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    config = f"algorithm: {{name: {name.split('_')[0]}}}\noptimizer: {{lr: {lr}}}\n"
    (run_dir / "config.yaml").write_text(config)
    records = [{"step": 0, "eval/pass@1": solved[0], "eval/mean@k": 0.1, "eval/samples": 4.0}]
    for step, norm in enumerate(norms, start=1):
        records.append({"step": step, "grad_norm": norm, "kl_old": 0.01 * step, "loss": 0.0})
        records[-1] |= {"router/raw_gamma_mean": gammas[step - 1]} if gammas else {}
    records[-1] |= {"eval/pass@1": solved[1], "eval/mean@k": 0.3, "eval/samples": 4.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


@pytest.fixture
def runs(tmp_path):
    rspo = write_run(tmp_path, "rspo_a", 1e-4, (0.2, 0.625), [1.0, 1.25, 1.5], [0.97, 0.93, 0.99])
    return [rspo, write_run(tmp_path, "grpo_<i>b", 2e-4, (0.2, 0.5), [1.0, 6.125, 2.0], ())]


def cells(page):
    table = page[: page.index("data-group")]
    rows = re.findall(r"<tr>(<td>.*?)</tr>", table)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_the_table_holds_each_runs_gains_and_extremes(runs, tmp_path):
    path = write_comparison(runs)
    assert path == tmp_path / "comparison.html"
    gain = "mean@4 10.0% to 30.0% (+20.0)"
    first = ["rspo_a", "rspo", "yes", "0.0001", "3", "20.0% to 62.5% (+42.5)", gain]
    second = ["grpo_&lt;i&gt;b", "grpo", "no", "0.0002", "3", "20.0% to 50.0% (+30.0)", gain]
    assert cells(path.read_text()) == [
        [*first, "1.5", "0.03", "0.93"],
        [*second, "6.12", "0.03", ""],
    ]


def test_a_run_of_two_losses_is_not_one_of_the_last(runs):
    configs = runs[0] / "configs"
    configs.mkdir()
    (configs / "step_0.yaml").write_text("algorithm: {name: rspo}\noptimizer: {lr: 1.0e-4}\n")
    (configs / "step_3.yaml").write_text("algorithm: {name: grpo}\noptimizer: {lr: 1.0e-4}\n")
    row = cells(write_comparison(runs).read_text())[0]
    assert (row[1], row[3]) == ("rspo; from step 3: grpo", "0.0001")


def test_a_curve_for_each_run_and_no_chart_without_data(runs):
    text = write_comparison(runs).read_text()
    charts = charts_of(text)
    assert set(charts) == {"pass_at_1", "mean_at_k", "loss", "grad_norm", "kl_old"}
    assert charts["grad_norm"]["series"] == [
        {"name": "rspo_a", "steps": [1, 2, 3], "values": [1.0, 1.25, 1.5]},
        {"name": "grpo_<i>b", "steps": [1, 2, 3], "values": [1.0, 6.125, 2.0]},
    ]
    assert charts["grad_norm"]["log"] and not charts["loss"]["log"]
    assert not charts["pass_at_1"]["smoothed"] and charts["loss"]["smoothed"]
    # One colour for each in all charts, by the order of the names.
    assert data_of(text)["arms"] == ["grpo_<i>b", "rspo_a"]


def test_samples_of_all_runs_are_on_one_page(runs):
    for run in runs:
        rows = [{"step": s, "prompt": "p", "completion": f"{run.name} {s}"} for s in (1, 2)]
        (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = data_of(write_comparison(runs).read_text())["samples"]
    assert [(sample["arm"], sample["step"], sample["completion"]) for sample in samples] == [
        (name, step, f"{name} {step}") for name in ("rspo_a", "grpo_<i>b") for step in (1, 2)
    ]


def test_another_page_can_be_named(runs, tmp_path):
    page = tmp_path / "out.html"
    assert write_comparison(runs, page) == page
    assert list(tmp_path.glob("*.html")) == [page]


def test_refuses_what_it_cannot_tell_apart(runs, tmp_path):
    with pytest.raises(UserError, match="found 1 runs to compare; expected 2 or more"):
        write_comparison(runs[:1])
    with pytest.raises(UserError, match="expected different runs"):
        write_comparison([runs[0], runs[1], runs[0]])
    with pytest.raises(UserError, match="none inside another"):
        write_comparison([tmp_path, runs[0]])


def one_curve(folder, name, norm):
    """A run of nothing but a gradient norm: one plot."""
    (folder / name).mkdir()
    (folder / name / "config.yaml").write_text("seed: 1\n")
    lines = [json.dumps({"step": step, "grad_norm": norm}) + "\n" for step in range(1, 41)]
    (folder / name / "metrics.jsonl").write_text("".join(lines))
    return folder / name


def test_every_run_has_a_row_and_a_curve(tmp_path):
    """The gradient norm of run n is n."""
    runs = [one_curve(tmp_path, f"run_{n:02}", float(n)) for n in range(1, 13)]
    page = write_comparison(runs).read_text()
    rows = cells(page)
    assert [row[0] for row in rows] == [run.name for run in runs]
    assert [row[7] for row in rows] == [str(n) for n in range(1, 13)]
    curves = charts_of(page)["grad_norm"]["series"]
    assert [curve["name"] for curve in curves] == [run.name for run in runs]
    assert [set(curve["values"]) for curve in curves] == [{float(n)} for n in range(1, 13)]


def test_a_glob_that_holds_its_own_output(tmp_path, capsys):
    runs = [one_curve(tmp_path, name, 1.0) for name in ("a", "b")]
    (tmp_path / "comparison_plots").mkdir()  # of an older version
    assert main(["report", *map(str, runs)]) == 0
    pages = [str(run / "report.html") for run in runs] + [str(tmp_path / "comparison.html")]
    assert capsys.readouterr().out.splitlines() == pages
    found = sorted(tmp_path.iterdir())
    assert len(found) == 4 and main(["report", *map(str, found), f"{runs[0]}/"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(pages)
    assert sorted(tmp_path.iterdir()) == found
    assert main(["report", str(tmp_path / "comparison.html")]) == 2
    assert "found no run in" in capsys.readouterr().err


def test_one_that_is_no_run_ends_it_before_anything_is_written(runs, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert main(["report", *map(str, runs), str(tmp_path / "notes")]) == 2
    assert "notes holds no config.yaml; expected" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_is_never_written_through_a_link(tmp_path):
    """Neither under the page's own name nor under that of a file on the way to it."""
    run, mine = one_curve(tmp_path, "a", 1.0), tmp_path / "mine.txt"
    mine.write_text("keep me")
    for name in ("report.html", "report.html.tmp", "metrics.jsonl.tmp"):
        (run / name).symlink_to(mine)
    write_report(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}')  # without a newline: the file is replaced
    drop_after(run / "metrics.jsonl", 2)
    assert mine.read_text() == "keep me"
    assert "<title>a</title>" in (run / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line(runs, capsys):
    (runs[0] / "report.html" / "inside").mkdir(parents=True)
    assert main(["report", str(runs[0])]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megatron-rl: error: the report could not be written (Is a directory: ")
    assert told.endswith(
        "; expected room on the disk and the right to write there; make room and give the command "
        "again\n"
    )
    assert told.count("\n") == 1
