"""The report's page in Chromium: what is drawn, and what answers to pointer and keys."""

import json
import threading

import pytest

from megatron_rl.report.charts import Group, Series, chart, heatmap
from megatron_rl.report.live import ReportServer
from megatron_rl.report.page import page as page_text
from tests.support.browser import browser, find_browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"),
]

ARMS = [f"arm_{n:02}" for n in range(12)]
TOKENS = {"text": ["3", "+", "4"], "gamma": [1.0, 0.5, 0.9], "ratio": [1.0, 2.0, 0.5]}


def arm_curves(scale):
    """Of arm n: n * scale at steps 1 to 100, and n * scale + 1 from then on to 200."""
    return [
        Series(name, range(1, 201), [n * scale + (step > 100) for step in range(1, 201)])
        for n, name in enumerate(ARMS)
    ]


def heat(name, rows, low=0.0):
    """Of row r at step s: 0, and 1 at the last row and the last step."""
    last = [0.0] * 49 + [1.0]
    series = {
        r: Series("", range(1, 51), last if r == rows - 1 else [low] * 50) for r in range(rows)
    }
    overall = Series("all layers", range(1, 51), last)
    return heatmap(name, f"Heat of {rows} layers with a long title", series, overall=overall)


GROUPS = [
    Group("Curves", [chart("first", "First", arm_curves(0.1)),
                     chart("other", "Other", arm_curves(1))]),
    Group(
        "More",
        [
            chart("own", "Of its own, with a long title that needs two lines on a telephone", [
                Series("up", [0, 50, 200], [0.25, 0.5, 0.75]),
                Series("band", [0, 200], [0.5, 0.5], low=[0.4, 0.4], high=[0.6, 0.6]),
            ], percent=True, smoothed=False, marks=[99.5]),
            chart("stack", "Stacked", [Series("a", [1, 2], [1.0, 2.0]), Series("b", [1], [3.0])],
                  stacked=True),
            chart("one", "One point", [Series("x", [7], [0.0])]),
            chart("log", "Wide", [Series("x", [1, 100, 200], [1e-4, 1.0, 100.0])], log=True),
            chart("empty", "Empty", []),
            heat("heat48", 48),
            heat("heat94", 94),
        ],
    ),
]  # fmt: skip
SAMPLES = [
    {"step": 1, "arm": "arm_00", "prompt": "3 4", "completion": "3+4", "reward": 1.0,
     "tokens": TOKENS},
    {"step": 2, "arm": "arm_01", "prompt": "<b>x</b>", "completion": "3-4", "reward": 0.0},
    {"step": 2, "arm": "arm_00", "prompt": "p", "completion": "none", "reward": 0.5,
     "reason": "why"},
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page_text("Title", "Summary", GROUPS, arms=ARMS, samples=SAMPLES))
    return path.as_uri()


@pytest.fixture
def page(chromium, address):
    chromium.look(1280)
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(address)
    yield chromium
    assert chromium.complaints == []
    assert [asked for asked in chromium.requests if not asked.startswith("data:")] == [address]


def texts(page, chosen):
    return page.evaluate(
        f"[...document.querySelectorAll({json.dumps(chosen)})].map(n => n.innerText)"
    )


def box(page, chosen):
    """Left, top, width and height in the window."""
    code = f"(() => {{ const n = document.querySelector({json.dumps(chosen)}); "
    code += "n.scrollIntoView({block: 'center'}); const b = n.getBoundingClientRect(); "
    return page.evaluate(code + "return [b.left, b.top, b.width, b.height]; })()")


def place_of(page, figure, step):
    """In the window, of a step at half height of a chart whose steps in view are 0 to 200."""
    left, top, width, height = box(page, f"#{figure} .plot")
    return left + 58 + (step + 2) / 204 * (width - 70), top + height / 2


def values(page, figure):
    """The legend's values by name."""
    names = page.evaluate(
        f"[...document.querySelectorAll('#{figure} .name')].map(n => n.innerText)"
    )
    return dict(zip(names, texts(page, f"#{figure} .legend b"), strict=True))


def click(page, chosen):
    left, top, width, height = box(page, chosen)
    for kind in ("Moved", "Pressed", "Released"):
        page.mouse(kind, left + width / 2, top + height / 2)


def test_all_charts_are_drawn(page):
    figures = page.evaluate("[...document.querySelectorAll('figure')].map(n => n.id)")
    assert figures == [c.data["id"] for group in GROUPS for c in group.charts]
    curves = "document.querySelectorAll('#first .curve').length"
    assert page.evaluate(curves) == 12
    colours = page.evaluate(
        "[...document.querySelectorAll('#first .curve, #other .curve')]"
        ".map(n => getComputedStyle(n).stroke)"
    )
    assert colours[:12] == colours[12:] and len(set(colours)) == 12
    assert page.evaluate("document.querySelectorAll('#stack .area').length") == 2
    assert page.evaluate("document.querySelectorAll('#own .mark').length") == 1
    assert texts(page, "#empty .at") == ["no values"]
    page.evaluate("document.querySelector('#empty .plot').focus()")
    page.key("ArrowLeft")
    assert texts(page, "#first .at") == ["last, step 200"]


def test_values_of_the_step_under_the_pointer(page):
    assert values(page, "first")["arm_03"] == "1.3" and texts(page, "#first .at") == [
        "last, step 200"
    ]
    page.mouse("Moved", *place_of(page, "first", 60))
    assert texts(page, "#first .at") == ["step 60"]
    assert values(page, "first") == {name: f"{n * 0.1:.3g}" for n, name in enumerate(ARMS)}
    # The same step in all charts; of a curve without it the last value before.
    assert values(page, "other")["arm_11"] == "11" and values(page, "own")["up"] == "50.0%"
    page.mouse("Moved", 5, 5)
    assert texts(page, "#first .at") == ["last, step 200"]


def test_an_arm_is_switched_off_in_all_charts(page):
    count = "['first', 'other', 'own'].map(n => document.querySelectorAll(`#${n} .curve`).length)"
    assert page.evaluate(count) == [12, 12, 2]
    click(page, "#other .legend button:nth-child(12)")
    assert page.evaluate(count) == [11, 11, 2]
    pressed = "document.querySelector('#first .legend button:nth-child(12)').ariaPressed"
    assert page.evaluate(pressed) == "false"
    click(page, "#own .legend button")
    assert page.evaluate(count) == [11, 11, 1]
    page.evaluate("[...document.querySelectorAll('.tools button')].pop().click()")  # show all
    assert page.evaluate(count) == [12, 12, 2]


def test_the_arm_of_the_legend_entry_under_the_pointer_stands_out_in_all_charts(page):
    faint = "['first', 'other', 'own'].map(n => document.querySelectorAll(`#${n} .faded`).length)"
    assert page.evaluate(faint) == [0, 0, 0]
    left, top, width, height = box(page, "#first .legend button:nth-child(3)")
    page.mouse("Moved", left + width / 2, top + height / 2)
    assert page.evaluate(faint) == [11, 11, 0]
    assert page.evaluate("document.querySelector('#other .chosen').dataset.curve") == "2"
    page.mouse("Moved", 5, 5)
    assert page.evaluate(faint) == [0, 0, 0]


def test_a_drag_chooses_the_steps_in_view(page):
    (x, y), (end, _) = (place_of(page, "first", step) for step in (50, 150))
    page.mouse("Moved", x, y)
    page.mouse("Pressed", x, y)
    page.mouse("Moved", end, y)
    assert (
        page.evaluate("Number(document.querySelector('#first .selection').getAttribute('width'))")
        > 100
    )
    page.mouse("Released", end, y)
    assert texts(page, ".range") == ["Steps 50 to 150"]
    assert texts(page, "#first svg text")[:1] and "200" not in texts(page, "#first svg text")
    click(page, ".tools button")
    assert texts(page, ".range") == ["Steps 0 to 200, drag to zoom"]


def test_keys_move_the_step(page):
    page.evaluate("document.querySelector('#own .plot').focus()")
    steps = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "Home", "End"):
        page.key(key)
        steps += texts(page, "#own .at")
    assert steps == ["step 50", "step 0", "step 50", "step 0", "step 200"]
    page.key("Escape")
    assert texts(page, "#own .at") == ["last, step 200"]
    page.evaluate("document.querySelector('#first .plot').focus()")
    page.key("ArrowLeft", shift=True)
    assert texts(page, "#first .at") == ["step 190"]
    page.key("+")
    assert texts(page, ".range") == ["Steps 139 to 200"]
    page.key("Escape")
    page.key("Escape")
    assert texts(page, ".range") == ["Steps 0 to 200, drag to zoom"]


def test_smoothing_is_a_mean_over_steps(page):
    assert page.evaluate("smooth([1, 2, 3, 10], [0, 3, 6, 4], 1)") == [1.5, 3, 4.5, 4]
    assert page.evaluate("smooth([0, 25, 50], [1, 2, 3], 12)") == [1, 2, 3]
    edges = "document.querySelector('#first .curve').getAttribute('d').match(/ [0-9.]+/g).length"
    sharp = (
        "new Set(document.querySelector('#first .curve').getAttribute('d').match(/ [0-9.]+/g)).size"
    )
    choose = "(() => {{ const s = document.getElementById('smoothing'); s.value = {}; "
    choose += (
        "s.dispatchEvent(new Event('input')); return document.querySelector('output').value; }})()"
    )
    assert page.evaluate(choose.format(0)) == "none"
    assert page.evaluate(sharp) == 2  # the value jumps from 0 to 1
    assert page.evaluate(choose.format(5)) == "mean of 17 steps"
    assert page.evaluate(sharp) > 10 and page.evaluate(edges) > 100
    page.mouse("Moved", *place_of(page, "first", 100))
    assert values(page, "first")["arm_00"] == "0"  # as measured


def test_numbers_and_ticks(page):
    shown = "[0.5, 0, 1234.5, 0.00012, 12.3456, -2, 1e9, null].map(v => shown(v))"
    assert page.evaluate(shown) == ["0.5", "0", "1,235", "1.2e-4", "12.35", "-2", "1e9", "–"]
    assert page.evaluate("[shown(0.1234, true), brief(0.123456)]") == ["12.3%", "0.123"]
    assert page.evaluate("ticks(0, 1, 5).values.map(v => tickLabel(v, 0.2, true))") == [
        *("0%", "20%", "40%", "60%", "80%", "100%")
    ]
    assert page.evaluate("logTicks(1e-4, 100)") == pytest.approx(
        [10.0**n for n in range(-4, 3)][::2]
    )
    assert page.evaluate(
        "[lastAt([1, 3, 5], 0), lastAt([1, 3, 5], 3), nearest([1, 3, 5], 4.5)]"
    ) == [*(-1, 1, 5)]
    assert page.evaluate("thinned([[0, 5], [0.2, 9], [0.4, 1], [0.6, 7], [0.8, 4], [3, 2]])") == [
        *([0, 5], [0.2, 9], [0.4, 1], [0.8, 4], [3, 2])
    ]


def test_a_heatmap_shows_each_cell_in_its_place(page):
    """One cell of 94 x 50 has the strongest colour, that of the last row and step."""
    code = """new Promise(done => { const image = new Image(); image.onload = () => {
      const canvas = document.createElement('canvas');
      [canvas.width, canvas.height] = [image.width, image.height];
      const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
      done([image.width, image.height,
        [...context.getImageData(0, 0, image.width, image.height).data]]);
    }; image.src = document.querySelector('#heat94 image').getAttribute('href'); })"""
    width, height, pixels = page.evaluate(code)
    assert height == 94 and 400 < width < 1200
    strong = [
        i for i in range(width * height) if pixels[4 * i : 4 * i + 4] == [0x2B, 0x16, 0x50, 255]
    ]
    assert {i // width for i in strong} == {93}
    # Steps -2 to 202 are in view: the cell of step 50 is between 49.5 and 50.5.
    columns = [i % width for i in strong]
    assert min(columns) == pytest.approx((49.5 + 2) / 204 * width, abs=1.5)
    assert max(columns) == pytest.approx((50.5 + 2) / 204 * width, abs=1.5)
    blank = [i % width for i in range(width * height) if pixels[4 * i + 3] == 0]
    assert min(blank) == 0 and max(blank) == width - 1  # before step 1 and after step 50


def test_values_of_a_heatmap(page):
    assert texts(page, "#heat48 .reading") == [*("all layers 1", "", "largest: layer 47 1")]
    page.evaluate("document.querySelector('#heat48 .plot').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft"):
        page.key(key)
    assert texts(page, "#heat48 .at") == ["step 49"]
    assert texts(page, "#heat48 .reading") == ["all layers 0", "layer 1 0", "largest: layer 0 0"]


def test_samples_are_chosen_and_their_tokens_coloured(page):
    answers = lambda: texts(page, "article .answer")  # noqa: E731
    assert answers() == ["3+4", "3-4", "none"]
    choose = "(() => {{ const n = document.querySelector('.of-{} > *'); n.value = '{}'; "
    choose += "n.dispatchEvent(new Event('input')); }})()"
    for name, value, left in (
        ("step", "2", ["3-4", "none"]),
        ("from", "0.5", ["none"]),
        ("step", "", ["3+4", "none"]),
        ("to", "0.5", ["none"]),
        ("from", "", ["3-4", "none"]),
        ("arm", "arm_01", ["3-4"]),
        ("to", "", ["3-4"]),
        ("arm", "", ["3+4", "3-4", "none"]),
    ):
        page.evaluate(choose.format(name, value))
        assert answers() == left
    backgrounds = "[...document.querySelectorAll('[data-token]')].map(n => n.style.backgroundColor)"
    gamma = page.evaluate(backgrounds)
    assert gamma[0] == "rgb(255, 255, 255)" and gamma[1] == "rgb(229, 138, 95)"
    assert len(set(gamma)) == 3
    click(page, "[data-colouring=ratio]")
    ratio = page.evaluate(backgrounds)
    assert ratio == ["rgb(255, 255, 255)", "rgb(141, 187, 228)", "rgb(232, 154, 124)"]
    page.evaluate("document.querySelector('.answer[tabindex]').focus()")
    page.key("ArrowRight")
    page.key("ArrowRight")
    assert texts(page, "article footer") == ['token 1: "+", gamma 0.5, ratio 2']


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overlaps(page, width):
    page.look(width)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    code = """[...document.querySelectorAll('figure')].map(figure => {
      const box = chosen => { const b = figure.querySelector(chosen).getBoundingClientRect();
                              return [b.left, b.top, b.right, b.bottom]; };
      return [box('h3'), box('.at'), box('.legend'), box('.plot'), box('figcaption')]; })"""
    figures = page.evaluate(code)
    assert len(figures) == 9
    for title, at, legend, plot, caption in figures:
        assert title[2] <= at[0] and max(title[3], at[3]) <= legend[1] + 1
        assert legend[3] <= plot[1] + 1 and plot[3] <= caption[1] + 1
        assert plot[2] <= width and legend[2] <= width
    texts_inside = """[...document.querySelectorAll('svg text')].map(n => {
      const [t, s] = [n, n.closest('svg')].map(m => m.getBoundingClientRect());
      return t.left >= s.left - 1 && t.right <= s.right + 1; })"""
    assert all(page.evaluate(texts_inside))


def test_dark_colours_and_print(page):
    colours = (
        "['body', 'figure'].map(n => getComputedStyle(document.querySelector(n)).backgroundColor)"
    )
    picture = "document.querySelector('#heat48 image').getAttribute('href')"
    light = page.evaluate(picture)
    page.look(1280, dark=True)
    page.wait_for(f"{picture} !== {json.dumps(light)}")
    assert page.evaluate(colours) == ["rgb(15, 18, 22)", "rgb(23, 27, 33)"]
    dark = page.evaluate(picture)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.wait_for(f"{picture} !== {json.dumps(dark)}")
    assert page.evaluate("rampOf('--ramp')[0]") == [0xEE, 0xF4, 0xF8]  # paper is light
    assert page.evaluate("getComputedStyle(document.getElementById('tools')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")


def test_without_the_script_there_is_a_table(page):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.requests.clear()
        page.open(page.evaluate("location.href"))
        shown = page.evaluate("document.body.innerText")
        assert "Without JavaScript: the last values." in shown and "arm_11\t2.1" in shown
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_page_of_a_run_that_goes_on_grows(chromium, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    chromium.complaints.clear()
    chromium.requests.clear()
    with ReportServer(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            chromium.open(server.address)
            assert texts(chromium, "#summary") == ["no step yet"]
            for step in (1, 2):
                with (tmp_path / "metrics.jsonl").open("a") as file:
                    file.write(
                        json.dumps({"step": step, "loss": 0.5 / step, "grad_norm": 1.0}) + "\n"
                    )
                chromium.wait_for(
                    f"document.querySelector('#loss .at')?.innerText === 'last, step {step}'"
                )
            assert values(chromium, "loss") == {"loss": "0.25"}
            assert texts(chromium, "#summary") == ["loss 0.5 -> 0.25, 2 steps in 0.0s"]
        finally:
            server.shutdown()
            thread.join()
        asked = [a for a in chromium.requests if not a.startswith("data:")]
        assert asked and all(a.startswith(server.address) for a in asked)
        assert chromium.complaints == []
        chromium.open("about:blank")
