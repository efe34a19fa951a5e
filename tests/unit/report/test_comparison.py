"""Runs side by side: the table's numbers, one curve a run in its own place, and refusals."""

import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.observe.run_files import drop_after
from megatron_rl.report.comparison import write_comparison
from megatron_rl.report.plots import LIGHT, _strokes
from megatron_rl.report.run_page import write_report


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
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
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


def test_a_curve_for_each_run_and_no_plot_without_data(runs, tmp_path):
    write_comparison(runs)
    plots = tmp_path / "comparison_plots"
    drawn = {path.stem for path in plots.glob("*.png")}
    assert drawn == {"pass_at_1", "mean_at_k", "loss", "grad_norm", "kl_old"}
    assert curve_colours(plots / "grad_norm.png") == {"first", "second"}
    # On a scale from 1 to 6.1 the second run's peak is far above all of the first run's curve.
    tops = {name: rows.min() for name, rows in curve_rows(plots / "grad_norm.png").items()}
    assert tops["second"] < tops["first"] - 50


def curve_rows(path):
    """The pixel rows below the legend in the colour of each curve."""
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)
    colours = {"first": (0x1F, 0x5F, 0x99), "second": (0xC8, 0x64, 0x1E)}
    legend = 80
    found = {}
    for name, colour in colours.items():
        rows = np.nonzero(np.abs(pixels[legend:] - colour).sum(-1) < 12)[0]
        if len(rows):
            found[name] = rows
    return found


def curve_colours(path):
    return set(curve_rows(path))


def test_another_page_can_be_named(runs, tmp_path):
    page = tmp_path / "out.html"
    assert write_comparison(runs, page) == page
    assert (tmp_path / "out_plots" / "loss.png").is_file()


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


def test_more_runs_than_colours_are_told_apart(tmp_path):
    """Every run has a row and a curve: run n is at the height of n, and the last is drawn too."""
    runs = [one_curve(tmp_path, f"run_{n:02}", float(n)) for n in range(1, 13)]
    page = write_comparison(runs)
    rows = cells(page.read_text())
    assert [row[0] for row in rows] == [run.name for run in runs]
    assert [row[7] for row in rows] == [str(n) for n in range(1, 13)]
    pixels = Image.open(tmp_path / "comparison_plots" / "grad_norm.png").convert("RGB")
    picture = np.asarray(pixels).astype(int)
    plot = picture[: picture.shape[0] * 3 // 5, picture.shape[1] // 5 : -picture.shape[1] // 10]
    coloured = (plot.max(-1) - plot.min(-1)) > 60
    drawn = np.flatnonzero(coloured.sum(1) > plot.shape[1] // 8)  # rows that a curve runs along
    curves = 1 + int((np.diff(drawn) > 1).sum())
    assert curves == 12
    strokes = list(itertools.islice(_strokes(LIGHT), 60))
    assert len({str(sorted(stroke.items())) for stroke in strokes}) == 60


def test_a_glob_that_holds_its_own_output(tmp_path, capsys):
    runs = [one_curve(tmp_path, name, 1.0) for name in ("a", "b")]
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
    names = ("report.html", "report.html.tmp", "metrics.jsonl.tmp", "plots/grad_norm.png")
    (run / "plots").mkdir()
    for name in names:
        (run / name).symlink_to(mine)
    write_report(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}')  # without a newline: the file is replaced
    drop_after(run / "metrics.jsonl", 2)
    assert mine.read_text() == "keep me"
    assert "<title>a</title>" in (run / "report.html").read_text()
    assert (run / "plots" / "grad_norm.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_that_cannot_be_written_is_one_line(runs, capsys):
    (runs[0] / "plots").write_text("a file where the folder should be")
    assert main(["report", str(runs[0])]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"megatron-rl: error: the report could not be written (File exists: {runs[0]}/plots); "
        "expected room on the disk and the right to write there; make room and give the command "
        "again\n"
    )
