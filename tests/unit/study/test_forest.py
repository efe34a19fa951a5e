"""The figure of differences, read back as XML: places by hand."""

import xml.etree.ElementTree as ET

import pytest

from megatron_rl.study.forest import Panel, forest
from megatron_rl.study.statistics import Estimate

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*panels, **more):
    root = ET.fromstring(forest(panels, "points", **more))
    marks = [
        e for e in root.iter() if e.get("class", "").split()[-1:] in (["right"], ["left"], ["rest"])
    ]
    return root, marks


def spans(marks):
    """(class, left, right) of each interval."""
    lines = [e for e in marks if e.get("class").startswith("interval")]
    ends = [e.get("d")[1:].replace("H", " ").split() for e in lines]
    return [
        (line.get("class").split()[1], float(left), float(right))
        for line, (left, _, right) in zip(lines, ends)
    ]


def test_places_and_colours():
    """A panel is 200 wide after 160 for names, 0 in its middle: 260. 105% of the furthest value, 10
    points, are its half, so that a point is 100 / 10.5.
    """
    rows = {
        "above": Estimate(0.06, 0.02, 0.10, 5),
        "below": Estimate(-0.05, -0.08, -0.01, 5),
        "either": Estimate(0.0, -0.01, 0.01, 5),
        "one seed": Estimate(0.03, None, None, 1),
        "itself": None,
    }
    root, marks = drawn(Panel("study", rows), scale=100)
    unit = 100 / 10.5
    expected = [("right", 2, 10), ("left", -8, -1), ("rest", -1, 1), ("rest", 3, 3)]
    for found, (kind, low, high) in zip(spans(marks), expected, strict=True):
        assert found[0] == kind
        assert found[1:] == pytest.approx((260 + low * unit, 260 + high * unit), abs=0.06)
    dots = [float(e.get("cx")) for e in root.iter(f"{SVG}circle")]
    assert dots == pytest.approx([260 + mean * unit for mean in (6, -5, 0, 3)], abs=0.06)
    names = [e.text for e in root.iter(f"{SVG}text") if e.get("class") == "arm"]
    assert names == list(rows)


def test_numbers_of_the_axis():
    root, _ = drawn(Panel("a", {"x": Estimate(6.0, 2.0, 10.0, 5)}))
    ticks = {
        e.text: float(e.get("x"))
        for e in root.iter(f"{SVG}text")
        if e.get("class") == "tick" and e.text != "points"
    }
    assert list(ticks) == ["-10", "-5", "0", "+5", "+10"]
    assert ticks["+5"] - ticks["0"] == pytest.approx(5 * 100 / 10.5, abs=0.06)


def test_what_lies_beyond_the_limit_is_an_arrow_at_the_edge():
    far = Estimate(-40.0, -45.0, -3.0, 5)
    root, marks = drawn(Panel("a", {"far": far, "near": Estimate(1.0, 0.5, 2.0, 5)}), limit=8)
    assert spans(marks) == [
        ("left", 160.0, pytest.approx(260 - 300 / 8)),
        ("right", pytest.approx(260 + 50 / 8, abs=0.06), 285.0),
    ]
    arrows = [e.get("d") for e in marks if e.get("d", "").endswith("z")]
    assert arrows == ["M160.0 42l7 -4v8z"]
    assert len(list(root.iter(f"{SVG}circle"))) == 1  # the far mean is not on the axis


def test_panels_share_rows_and_axis():
    one = Panel("one", {"a": Estimate(1.0, 0.0, 2.0, 5)})
    two = Panel("two & more", {"b": Estimate(4.0, 2.0, 8.0, 5), "a": Estimate(1.0, 0.0, 2.0, 5)})
    root, marks = drawn(one, two)
    (_, left, right), (_, a_left, a_right), (_, b_left, b_right) = spans(marks)
    assert (right - left) == pytest.approx(a_right - a_left, abs=0.11)  # drawn to tenths
    assert a_left - left == pytest.approx(236)  # width of a panel and the gap
    assert b_right - b_left == pytest.approx(3 * (a_right - a_left), abs=0.2)
    titles = [e.text for e in root.iter(f"{SVG}text") if e.get("class") == "title"]
    assert titles == ["one", "two & more"]


def test_nothing_to_draw_is_an_empty_figure():
    root, marks = drawn(Panel("a", {"x": None}))
    assert not marks
    assert [e.text for e in root.iter(f"{SVG}text") if e.get("class") == "arm"] == ["x"]
