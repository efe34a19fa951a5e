"""torchrun, with one closing line in place of its traceback, and the ranks' exit code.

torchrun.sh runs this file with the arguments of `torch.distributed.run`. Exit code: the first
failed rank's (2: a mistake in the input, 1: the run failed, 128 + N: killed by signal N); 75 after
a signal to this process, when the ranks have saved a checkpoint and the same command continues from
it.

After a failure, while MAX_RESTARTS is above 0, the node starts again from torchrun.sh, with one
restart less. So all nodes meet again, wherever each of them failed, also a replaced node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

STOPPED = 75  #: EX_TEMPFAIL: try again
#: The ranks of other nodes may notice a loss after device.timeout_s only (600 s), and then end.
MEET_AGAIN_S = 900


def run(argv: list[str]) -> int:
    """Run the ranks of this node; the exit code."""
    # "failed (exitcode: 2)" and a table of failures say again what the ranks have said.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        ended = f"exit code {code}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"torchrun.sh: rank {rank} ended with {ended}, see above", file=sys.stderr)
        return code
    except SignalException as error:
        print(f"torchrun.sh: {error.sigval.name}: the ranks were stopped", file=sys.stderr)
        return STOPPED
    except DistError as error:
        said = " ".join(str(error).split())[:200]
        print(f"torchrun.sh: the nodes did not meet ({said})", file=sys.stderr)
        return 1
    return 0


def start_again(argv: list[str]) -> None:
    """Become torchrun.sh once more, unless no restart is left."""
    left = int(os.environ.get("MAX_RESTARTS", "0"))
    if not left:
        return
    print(f"torchrun.sh: starts again ({left - 1} restarts left)", file=sys.stderr, flush=True)
    patience = max(int(os.environ.get("PREFLIGHT_S", "0")), MEET_AGAIN_S)
    os.environ |= {"MAX_RESTARTS": str(left - 1), "PREFLIGHT_S": str(patience)}
    for number in map(int, os.listdir("/proc/self/fd")):  # the store's port among them
        if number > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(number, False)
    script = str(Path(__file__).with_name("torchrun.sh"))
    os.execv(script, [script, *argv[argv.index("-m") + 2 :]])


if __name__ == "__main__":
    code = run(sys.argv[1:])
    if code not in (0, 2, STOPPED):
        start_again(sys.argv[1:])
    sys.exit(code)
