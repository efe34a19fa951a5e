"""Commands of one rank, one after the other in a single process, which starts but once.

Reads [words, ...] as JSON, writes [[code, output, errors], ...].
`tests.support.runs.run_in_turn` runs it where the package is installed, without the tests.
"""

import contextlib
import io
import json
import sys


def main() -> int:
    from megatron_rl.cli import main as run

    done = []
    for words in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
        done.append((code, out.getvalue(), err.getvalue()))
    json.dump(done, sys.stdout)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
