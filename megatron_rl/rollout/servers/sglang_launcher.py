"""Starts SGLang with its key, which no process list shows. A script of its own:

    MEGATRON_RL_SERVER_KEY=... python sglang_launcher.py MODULE ARGUMENT...

SGLang takes its key only as an argument. So this script adds the argument inside the process. With
a key SGLang guards all routes but /health, /ready and /metrics.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run the module as `python -m` would."""
    key = os.environ["MEGATRON_RL_SERVER_KEY"]
    # Python put this directory first, and its sglang.py is not the package sglang.
    sys.path[0] = os.getcwd()
    sys.argv[:] = [*sys.argv[1:], "--api-key", key]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
