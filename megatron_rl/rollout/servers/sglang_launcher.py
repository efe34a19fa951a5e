"""Starts SGLang with a key that no process list shows: a script of its own.

    MEGATRON_RL_SERVER_KEY=... python keyed.py MODULE WORD...

SGLang takes its key as a word of its command and from nowhere else. So the word is added behind the
others inside the process. With a key SGLang guards all routes but /health, /ready and /metrics.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run the module as `python -m` would."""
    key = os.environ["MEGATRON_RL_SERVER_KEY"]
    sys.path[0] = os.getcwd()  # and not this directory, whose sglang.py is another
    sys.argv[:] = [*sys.argv[1:], "--api-key", key]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
