"""Convert a checkpoint between Hugging Face and Megatron: ``megatron-rl convert``, from a checkout.

python tools/convert_checkpoint.py SOURCE TARGET [--verify] [--like DIR] [--shard-gib GIB]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
