"""Fenced code blocks of Markdown text, after CommonMark 0.31, section 4.5, as models write them.

Beyond CommonMark: a fence may be indented by more than three columns, as in a list, and the content
of a Markdown block is read as Markdown again.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

_OPENING = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_PYTHON = frozenset(("", "py", "python", "python2", "python3"))
_MARKDOWN = frozenset(("markdown", "md"))
_MOST_ENDS = 7
_MOST_BEHIND = 64  # later fences that are tried as another end of a block
#: Most blocks read from a text: a model may repeat a fence up to its length limit.
MAX_BLOCKS = 64


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str  #: first word of the info string, in lower case; may be empty
    text: str  #: without the fences' indentation
    #: the same block with later ends than by the rules, shortest first: a Python docstring may
    #: contain a fence
    longer: tuple[str, ...]

    @property
    def is_python(self) -> bool:
        """Whether the info string names Python, or is empty."""
        return self.language in _PYTHON


def fenced_blocks(text: str) -> list[Block]:
    """The last ``MAX_BLOCKS`` blocks of a text, in order; an unclosed block ends with the text."""
    blocks = []
    for block in _blocks(text):
        blocks += _blocks(block.text) if block.language in _MARKDOWN else [block]
    return blocks[-MAX_BLOCKS:]


def _blocks(text: str) -> list[Block]:
    lines = text.split("\n")
    fences = [n for n, line in enumerate(lines) if _OPENING.fullmatch(line.rstrip()) is not None]
    found, place = [], 0
    while place < len(lines):
        opening = _opening(lines[place])
        place += 1
        if opening is not None:
            ends = _ends(lines, fences, place, opening)
            found.append((opening, place, ends))
            place = ends[0] + 1
    blocks = []
    for opening, start, ends in found[-MAX_BLOCKS:]:
        content = [_dedented(line, opening["indent"]) for line in lines[start : ends[-1]]]
        first, *longer = ("\n".join(content[: end - start]) for end in ends)
        blocks.append(Block(_language(opening["info"]), first, tuple(longer)))
    return blocks


def _ends(lines: list[str], fences: list[int], start: int, opening: re.Match[str]) -> list[int]:
    """Lines that can end a block that begins at line ``start``; the actual end comes first."""
    ends: list[int] = []
    behind = 0
    for place in range(bisect.bisect_left(fences, start), len(fences)):
        number = fences[place]
        behind += bool(ends)
        if behind > _MOST_BEHIND:
            break
        if _closes(lines[number], opening):
            ends.append(number)
        elif ends and _opens_another(lines[number]):
            break
        if len(ends) == _MOST_ENDS:
            break
    return ends or [len(lines)]


def loose_blocks(text: str) -> list[str]:
    """The texts between every first and second ``` anywhere in a line, for answers that close a
    block right after its last statement.
    """
    blocks = []
    for piece in text.split("```")[1::2][-MAX_BLOCKS:]:
        first, newline, rest = piece.partition("\n")
        blocks.append(rest if newline and _language(first) in _PYTHON else piece)
    return blocks


def begins_with_fence(text: str) -> bool:
    """Whether the first line that is not blank opens a block."""
    return _opening(text.lstrip().partition("\n")[0]) is not None


def _opening(line: str) -> re.Match[str] | None:
    match = _OPENING.fullmatch(line.rstrip("\r"))
    # Back-ticks after back-ticks: code within a line.
    return None if match is None or (match["fence"][0] == "`" and "`" in match["info"]) else match


def _opens_another(line: str) -> bool:
    opening = _opening(line)
    return opening is not None and bool(opening["info"].strip())


def _closes(line: str, opening: re.Match[str]) -> bool:
    match = _OPENING.fullmatch(line.rstrip())
    return (
        match is not None
        and not match["info"]
        and match["fence"][0] == opening["fence"][0]
        and len(match["fence"]) >= len(opening["fence"])
        and _width(match["indent"]) < _width(opening["indent"]) + 4
    )


def _language(info: str) -> str:
    words = info.strip().strip("{}").split()
    return words[0].lstrip(".").rstrip(",").lower() if words else ""


def _width(indent: str) -> int:
    return len(indent.expandtabs(4))


def _dedented(line: str, indent: str) -> str:
    """A line without the fence's indentation, if it has any."""
    if line.startswith(indent):
        return line[len(indent) :]
    return line[min(len(line) - len(line.lstrip(" ")), len(indent)) :]
