"""Runs side by side: the table's numbers, one curve a run in its own place, and refusals."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from megatron_rl.errors import UserError
from megatron_rl.observe.comparison import write_comparison


def write_run(folder, name, lr, solved, norms, gammas):
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    config = f"algorithm: {{name: {name.split('_')[0]}}}\noptimizer: {{lr: {lr}}}\n"
    (run_dir / "config.yaml").write_text(config)
    records = [{"step": 0, "eval/pass@1": solved[0], "eval/mean@k": 0.1, "eval/samples": 4.0}]
    for step, norm in enumerate(norms, start=1):
        records.append({"step": step, "grad_norm": norm, "kl_old": 0.01 * step, "loss": 0.0})
        records[-1] |= {"router/shift_mean": gammas[step - 1]} if gammas else {}
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
    with pytest.raises(UserError, match="found 1 runs to compare; expected 2 to 5"):
        write_comparison(runs[:1])
    with pytest.raises(UserError, match="found 6 runs"):
        write_comparison([*runs, *runs, *runs])
    with pytest.raises(UserError, match="expected different runs"):
        write_comparison([runs[0], runs[1], runs[0]])
    with pytest.raises(UserError, match="none inside another"):
        write_comparison([tmp_path, runs[0]])
