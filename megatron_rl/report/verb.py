"""``megatron-rl report``: pages of runs, a comparison of several, or a run's page that is live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import written_for_the_user
from megatron_rl.report.comparison import write_comparison
from megatron_rl.report.live import serve
from megatron_rl.report.run import runs_among
from megatron_rl.report.run_page import write_report


def report(run_dirs: Sequence[Path], say: Callable[[str], None]) -> None:
    """Write the page of each run, and that of all beside them; say where.

    UserError: there is no run, or one cannot be read or written.
    """
    runs, written = runs_among(run_dirs)
    if not runs:
        raise UserError(f"found no run in {', '.join(map(str, written))}; expected RUN_DIR")
    with written_for_the_user("the report", "make room and give the command again"):
        # First, because it reads all runs: a mistake shows before anything is written.
        pages = [write_comparison(runs)] if len(runs) > 1 else []
        for page in [*map(write_report, runs), *pages]:
            say(str(page))


def watch(run_dirs: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serve the page of one run until Ctrl-C; say its address.

    UserError: it is no run, there are several, or the port is taken.
    """
    if len(run_dirs) != 1:
        raise UserError(f"--watch with {len(run_dirs)} runs; expected one RUN_DIR")
    serve(run_dirs[0], port, say)
