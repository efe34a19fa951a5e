"""``python -m megatron_rl``, also under torchrun."""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
