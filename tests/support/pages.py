"""What a page of the report holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Tags(HTMLParser):
    """Tags, text, and every attribute of a page as (tag, name, value)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self._data = False
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._data = tag == "script" and ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._data = False

    def handle_data(self, data: str) -> None:
        if self._data:
            self.data += data
        else:
            self.text.append(data)


def data_of(page: str) -> dict[str, Any]:
    """The data that the page's script reads."""
    return json.loads(Tags(page).data)


def charts_of(page: str) -> dict[str, dict[str, Any]]:
    """Its charts, by their id."""
    return {chart["id"]: chart for g in data_of(page)["groups"] for chart in g["charts"]}
