"""Chat templates: programs of a tokenizer's author. None may hang, fill the memory, or do more than
write text with the user's messages.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Iterator

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data import chat_template
from megatron_rl.data.tokenizers import load_tokenizer
from megatron_rl.rewards.worker_pool import WorkerPool
from tests.support.chat_tokenizers import save_qwen
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong

_GOOD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}",
)
_PIECES = (
    *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{% if %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a' * 10**10 }}", "{{ 2 ** 10**8 }}"),
    *("{{ 'a' * 30000000 }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ ''.__class__.__mro__ }}", "{{"),
    *(
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ),
    *(
        "{{ lipsum(n=100000) }}",
        "{{ '%099999999d' % 1 }}",
        "{{ 'x'.center(10**9) }}",
        "{% set m = 1 %}",
    ),
    *("{{ raise_exception('a\nb') }}", "{{ '{:>999999999}'.format(1) }}", "{% raw %}", "{# ", "\0"),
    *(
        "{{ strftime_now('%Y') }}",
        "{{ messages | tojson }}",
        "{% break %}",
        "{% extends 'x' %}",
        "}}",
    ),
    *(
        "{{ range(10**9) | list }}",
        "{{ self }}",
        "{{ dict(a=1) }}",
        "{% set ns = namespace(a=1) %}",
    ),
)
_CHATS = (
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "user", "content": "<|im_end|> {{ 1 }} <|im_start|>"}],
    [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "\u00e9 \U0001f600"}],
)


def make(rng: random.Random) -> tuple[str, list[dict[str, str]], bool]:
    """(template, chat, whether it is a good one)."""
    template, chat = rng.choice(_GOOD), rng.choice(_CHATS)
    if rng.random() < 0.2:
        return template, chat, chat is _CHATS[0]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(template) + 1)
        cut = rng.choice([0, 0, 1, 5])
        piece = rng.choice(_PIECES) if rng.random() < 0.6 else chr(rng.randrange(32, 127))
        template = template[:place] + piece + template[place + cut :]
    return template, chat, False


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """One tokenizer, whose template is replaced for each case; one second for a chat."""
    tokenizer = load_tokenizer(TokenizerConfig(kind="huggingface", path=save_qwen(folder)))
    script = Path(chat_template.__file__).with_name("template_worker.py")
    before, chat_template._WORKERS = chat_template._WORKERS, WorkerPool(script, 1.0, 50.0, "none")

    def judge(case: tuple[str, list[dict[str, str]], bool]) -> Verdict:
        template, chat, good = case
        tokenizer._tokenizer.chat_template = template
        try:
            ids = tokenizer.encode_prompt(chat)
        except Exception:
            if good:
                raise Wrong(f"refused: {template[:200]!a}") from None
            raise
        shown = tokenizer.show(ids)
        if any(m["role"] == "user" and m["content"].strip() not in shown for m in chat):
            raise Wrong(f"a message is missing: {template[:200]!a}")
        return Verdict.TAKEN

    yield judge
    chat_template._WORKERS = before


KIND = Kind("chat_templates", make, judging, deadline_s=60.0)
