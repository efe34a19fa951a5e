"""A study's page in Chromium: table, curves of the arms with their bands, and links to the runs."""

import json

import pytest

from megatron_rl.study.analysis import analyse
from megatron_rl.study.page import write_study_page
from tests.support.browser import browser, find_browser
from tests.support.written_study import written_plan

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"),
]

#: Of the chart of reward/solved.
CHART = "#reward_2f_solved"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = written_plan(tmp_path)
    (plan.runs[0].run_dir / "report.html").write_text("<title>the report</title>")
    address = write_study_page(analyse(plan)).resolve().as_uri()
    with browser() as page:
        page.look(1280)
        page.open(address)
        yield page
        assert page.complaints == []
        asked = [one for one in page.requests if not one.startswith("data:")]
        assert asked[0] == address and len(asked) <= 2  # and one run's report


def texts(page, chosen):
    code = f"[...document.querySelectorAll({json.dumps(chosen)})].map(n => n.innerText)"
    return page.evaluate(code)


def test_a_study_in_numbers_curves_and_runs(page):
    """Every reader's way through the page, in one browser."""
    arms, runs = "section.runs tbody tr", "section.samples tbody tr"
    assert texts(page, f"{arms}:nth-child(2) td")[:4] == [
        *("rspo", "3", "63.3% [40.0% to 90.0%]", "+13.3 [+10.0 to +20.0]")
    ]
    assert texts(page, f"{runs} td:nth-child(2)") == [*8 * ["done"], "stopped"]

    count = f"['curve', 'band'].map(n => document.querySelectorAll(`{CHART} .${{n}}`).length)"
    assert page.evaluate(count) == [3, 3]
    assert texts(page, f"{CHART} .name") == ["gmpo", "rspo", "grpo"]
    page.evaluate(f"document.querySelector('{CHART} .plot').focus()")
    page.key("Home")
    assert texts(page, f"{CHART} .at") == ["step 1"]
    assert texts(page, f"{CHART} .legend b") == ["16.7%", "20.0%", "20.0%"]  # means over seeds
    page.evaluate(f"document.querySelectorAll('{CHART} .legend button')[1].click()")
    assert page.evaluate(count) == [2, 2]
    assert page.evaluate("document.querySelectorAll('#entropy .curve').length") == 2

    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    page.look(390)
    page.wait_for("document.documentElement.scrollWidth === 390")

    assert texts(page, f"{runs} a") == ["gmpo seed 1"]  # the only one that has a report
    page.open(page.evaluate(f"document.querySelector('{runs} a').href"))
    assert page.evaluate("document.title") == "the report"
