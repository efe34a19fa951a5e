"""HTML pages in one file: sections, charts and samples as data, and the script that draws them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.files import write_whole
from megatron_rl.report.charts import Group

_FILES = Path(__file__).parent / "page_files"
#: In the order in which they need each other.
SCRIPTS = ("draw.js", "frame.js", "lines.js", "heatmap.js", "samples.js", "page.js")


def page(
    title: str,
    summary: str,
    sections: Sequence[str | Group],
    *,
    arms: Iterable[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    sample_note: str = "",
    live: str = "",
) -> str:
    """An HTML page that asks the network for nothing.

    Args:
        title: heading of the page.
        summary: a line below it.
        sections: HTML, and groups of charts where they shall stand. The browser of samples stands
            in ``<section id='samples' hidden></section>``, at the end where there is none.
        arms: names of curves that have one colour in all charts, by the order of the names, and
            are switched on and off in all of them.
        samples: for the browser of samples (`samples.for_page`); none: no browser.
        sample_note: what the page says of them, such as how many there are.
        live: version of the data of a page that asks its server, and nobody else, for newer data
            (`live.serve`); "": the page is a file.

    Raises:
        ValueError: two charts of the page have one name.
    """
    groups = [section for section in sections if isinstance(section, Group)]
    names = [chart.data["id"] for group in groups for chart in group.charts]
    if len(set(names)) < len(names):
        raise ValueError(f"found charts named {sorted(names)}; expected each name once")
    data = page_data(groups, arms=arms, samples=samples, sample_note=sample_note)
    parts, number = [], 0
    for section in sections:
        if isinstance(section, Group):
            parts.append("<div id='tools' class='tools' hidden></div>" if number == 0 else "")
            parts.append(_placeholder(section, number))
            number += 1
        else:
            parts.append(section)
    if samples and not any("id='samples'" in part for part in parts):
        parts.append("<section id='samples' hidden></section>")
    return _document(title, summary, "".join(parts), {**data, "version": live})


def page_data(
    groups: Sequence[Group],
    *,
    arms: Iterable[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    sample_note: str = "",
) -> dict[str, Any]:
    """What the page's script reads."""
    return {
        "groups": [group.to_json() for group in groups],
        "arms": sorted(set(arms)),
        "samples": list(samples),
        "sample_note": sample_note,
    }


def write_page(
    path: Path,
    title: str,
    summary: str,
    sections: Sequence[str | Group],
    *,
    arms: Iterable[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a page (`page`) in one rename."""
    write_whole(path, page(title, summary, sections, arms=arms, samples=samples))


def to_json(data: Any) -> str:
    """Strict JSON that can stand inside a script element: no ``<`` in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


@lru_cache(maxsize=1)
def _script() -> str:
    return "\n".join((_FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)


@lru_cache(maxsize=1)
def _style() -> str:
    return (_FILES / "page.css").read_text(encoding="utf-8")


def _policy(live: str) -> str:
    """Content security policy: this script alone runs, and nothing is asked of the network.
    Heatmaps are pictures that the script makes."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode("ascii")
    asked = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        f"img-src data:; connect-src {asked}; base-uri 'none'; "
        "form-action 'none'"
    )


def _document(title: str, summary: str, body: str, data: Mapping[str, Any]) -> str:
    shown = escape(title)
    icon = "<link rel='icon' href='data:,'>" if data["version"] else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(data["version"])}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'>{icon}"
        f"<title>{shown}</title><style>{_style()}</style></head>\n"
        f"<body><main><header><h1>{shown}</h1>"
        f"<p class='summary' id='summary'>{escape(summary)}</p></header>"
        f"{body}</main>\n"
        f"<script type='application/json' id='data'>{to_json(data)}</script>\n"
        f"<script>{_script()}</script></body></html>\n"
    )


def _placeholder(group: Group, number: int) -> str:
    """Where the script puts a group of charts; without it, a table of their last values."""
    rows = "".join(
        f"<tr><td>{escape(chart.data['title'])}</td><td>{escape(name)}</td>"
        f"<td class='number'>{value:.6g}</td></tr>"
        for chart in group.charts
        for name, value in chart.last_values()
    )
    table = (
        f"<noscript><h2>{escape(group.title)}</h2><p>Without JavaScript: the last values.</p>"
        "<div class='scroll'><table><thead><tr><th>Chart</th><th>Curve</th><th>Last</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div></noscript>"
    )
    return f"<section class='group' data-group='{number}' hidden></section>{table if rows else ''}"
