"""Charts as data, and the page around them."""

import base64
import hashlib
import json
import math
import re

import pytest

from megatron_rl.report.charts import MOST_COLUMNS, Group, Series, chart, heatmap
from megatron_rl.report.page import page, to_json
from tests.support.pages import Tags, charts_of, data_of

UP = Series("up", [1, 2, 3], [0.1, 0.2, 0.3])


def test_a_point_needs_finite_numbers():
    band = Series("a", [1, 2, 4], [1.0, math.nan, 2.0], low=[0.5, 0.0, math.inf], high=[2, 3, 4])
    assert band.to_json() == {"name": "a", "steps": [1], "values": [1], "low": [0.5], "high": [2]}
    assert Series("b", [], []).to_json() == {"name": "b", "steps": [], "values": []}
    assert Series("c", [7], [1234567.8]).to_json()["values"] == [1234570.0]  # six digits
    with pytest.raises(ValueError):
        Series("d", [1, 2], [1.0]).to_json()


def test_curves_without_a_value_are_left_out():
    data = chart("x", "X", [UP, Series("none", [1], [math.nan])]).data
    assert [series["name"] for series in data["series"]] == ["up"]
    assert chart("x", "X", [UP]).last_values() == [("up", 0.3)]


def test_a_heatmap_has_a_column_a_step_and_blanks():
    rows = {3: Series("", [1, 2], [0.1, 0.2]), 0: Series("", [2, 5], [0.5, math.nan])}
    data = heatmap("h", "H", rows, overall=UP).data
    assert data["rows"] == [0, 3] and data["steps"] == [1, 2, 5]
    assert data["values"] == [[None, 0.5, None], [0.1, 0.2, None]]
    assert data["overall"]["values"] == [0.1, 0.2, 0.3]
    assert heatmap("h", "H", rows, overall=UP).last_values() == [("up", 0.3)]


def test_a_heatmap_needs_a_value():
    with pytest.raises(ValueError, match="h: found no finite value"):
        heatmap("h", "H", {0: Series("", [1], [math.nan])})


@pytest.mark.parametrize("largest, cells", [(False, [1.0, 4.0, 6.0]), (True, [2.0, 5.0, 6.0])])
def test_many_steps_share_columns(monkeypatch, largest, cells):
    """Steps 0 to 6 with their number as value, of which three columns hold 0-2, 3-5 and 6."""
    monkeypatch.setattr("megatron_rl.report.charts.MOST_COLUMNS", 3)
    rows = {0: Series("", range(7), [float(n) for n in range(7)])}
    data = heatmap("h", "H", rows, caption="C.", largest=largest).data
    assert data["steps"] == [0, 3, 6] and data["width"] == 3 and data["values"] == [cells]
    word = "largest" if largest else "mean"
    assert data["caption"] == f"C. A column is the {word} of 3 steps."


def test_the_number_of_columns_is_bounded():
    rows = {0: Series("", range(10_001), [0.0] * 10_001)}
    assert len(heatmap("h", "H", rows).data["steps"]) <= MOST_COLUMNS


def test_a_page_holds_its_data_and_asks_the_network_for_nothing():
    hostile = "</script><script>alert(1)</script><!--"
    text = page(
        hostile,
        "summary",
        ["<p>first</p>", Group("One", [chart("a", hostile, [UP])]), Group("Two", [])],
        arms=["b", "a"],
        samples=[{"step": 1, "prompt": hostile}],
    )
    assert charts_of(text)["a"]["title"] == hostile
    assert data_of(text)["samples"][0]["prompt"] == hostile and data_of(text)["arms"] == ["a", "b"]
    found = Tags(text)
    assert found.tags.count("script") == 2 and "link" not in found.tags
    addresses = [a for a in found.attributes if a[1] in ("src", "href", "srcset", "action")]
    assert addresses == []
    # The only address in the script is the name of SVG, the only url() none.
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text and "@import" not in text
    assert text.index("<p>first</p>") < text.index("id='tools'") < text.index("data-group='0'")
    assert text.index("data-group='1'") < text.index("id='samples'")


def test_only_the_pages_own_script_may_run():
    text = page("t", "s", [Group("One", [chart("a", "A", [UP])])])
    (policy,) = [v for tag, name, v in Tags(text).attributes if (tag, name) == ("meta", "content")][
        :1
    ]
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';")
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in page("t", "s", [], live="1")


def test_two_charts_of_one_name_are_a_mistake():
    groups = [Group("One", [chart("a", "A", [UP])]), Group("Two", [chart("a", "B", [UP])])]
    with pytest.raises(ValueError, match="expected each name once"):
        page("t", "s", groups)


def test_the_json_is_strict_and_has_no_tags():
    assert json.loads(to_json({"a": "<b>\u2028é"})) == {"a": "<b>\u2028é"}
    assert "<" not in to_json({"a": "<b>"})
    with pytest.raises(ValueError):
        to_json({"a": math.nan})
