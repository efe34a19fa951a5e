"""The worker of ``chat_template.py``: ``template_worker.py CPU_S`` renders chats by templates.

A template is a program of the tokenizer's author: nested loops can run for ever, and a text times a
number can take all memory. So it runs in jinja2's sandbox, as in transformers, and in this process,
with limits of time, memory and output.

Reads one JSON list [template, variables, messages] a line. Writes "ready" (or what is
missing), then a JSON list for each line: ["text", what was rendered] or ["refused", why]. Ends when
its input ends. Imports nothing of this package.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

_MEMORY_BYTES = 2 * 2**30
#: Longest text of a chat, characters: no model reads as many.
_MOST_CHARACTERS = 16 * 2**20


class _Late(BaseException):
    """The time limit was reached; no error handler may catch it."""


def main() -> None:
    cpu_s = float(sys.argv[1])
    # Libraries may print to stdout: replies go to a descriptor that nothing else knows.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="ascii")
    os.dup2(2, 1)
    try:
        from transformers import PreTrainedTokenizerBase
    except ImportError as error:
        replies.write(f"{ascii(str(error))}\n")
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _late)
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_answer(line, cpu_s, PreTrainedTokenizerBase)) + "\n")


def _late(*_: object) -> None:
    raise _Late


def _answer(line: bytes, cpu_s: float, kind: Any) -> list[str]:
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        template, names, messages = json.loads(line)
        text = kind(chat_template=template).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **names
        )
        if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
            return ["refused", f"it writes more than {_MOST_CHARACTERS:,} characters"]
        return ["text", text]
    except _Late:
        return ["refused", f"it takes more than {cpu_s:g} s"]
    except MemoryError:
        return ["refused", "it takes more memory than a chat can need"]
    except Exception as error:  # noqa: BLE001 - a template fails in as many ways as any program
        reason = " ".join(str(error).split()) or type(error).__name__
        return ["refused", reason if len(reason) <= 200 else f"{reason[:200]}..."]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


if __name__ == "__main__":
    main()
