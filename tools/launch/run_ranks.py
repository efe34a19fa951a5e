"""torchrun, with one line at the end in the place of its traceback, and the ranks' exit code.

torchrun.sh runs this file with the words of `torch.distributed.run`. Exit code: the first failing
rank's (2: a mistake in the input, 1: the run failed, 128 + N: killed by signal N); 75 after a
signal to this process, when the ranks have saved a checkpoint and the same command goes on from it.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

STOPPED = 75  #: EX_TEMPFAIL: try again


def run(words: list[str]) -> int:
    """Run the ranks of this node; the exit code."""
    # "failed (exitcode: 2)" and a table of failures say again what the ranks have said.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        ended = f"exit code {code}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"torchrun.sh: rank {rank} ended with {ended}, see above", file=sys.stderr)
        return code
    except SignalException as error:
        print(f"torchrun.sh: {error.sigval.name}: the ranks were stopped", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
