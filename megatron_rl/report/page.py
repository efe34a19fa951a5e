"""HTML pages that hold their style sheet and their plots."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_rl.files import write_whole
from megatron_rl.report.plot_list import Plot
from megatron_rl.report.plots import DARK, LIGHT, render
from megatron_rl.report.run import Run
from megatron_rl.report.style import STYLE


def write_page(path: Path, title: str, summary: str, sections: Sequence[str]) -> None:
    """Write a page of a title, a line below it and sections of HTML, in one rename."""
    shown = escape(title)
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{shown}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{shown}</h1><p class='summary'>{escape(summary)}</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )
    write_whole(path, page)


def write_figures(plots: Sequence[Plot], run: Run, folder: Path) -> str:
    """Draw the plots the run has data for: PNG files in the folder, and a section of a page."""
    folder.mkdir(exist_ok=True)
    figures = []
    for plot in plots:
        if plot.has_data(run):
            light, dark = render(plot, run, LIGHT), render(plot, run, DARK)
            write_whole(folder / f"{plot.file}.png", light)
            figures.append(_figure(plot, light, dark))
    return f"<section class='plots'>{''.join(figures)}</section>"


def _figure(plot: Plot, light: bytes, dark: bytes) -> str:
    sources = [
        f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in (light, dark)
    ]
    return (
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{sources[1]}'>"
        f"<img src='{sources[0]}' alt='{escape(plot.title, quote=True)}'></picture>"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )
