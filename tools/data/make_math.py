"""Makes a data set of mathematics problems from JSONL files of questions and answers.

    python tools/data/make_math.py --source gsm8k/train.jsonl --out data/train.jsonl

The source has one object a line, like GSM8K (https://github.com/openai/grade-school-math,
grade_school_math/data; --question-key question, --answer-key answer, both the defaults). Each line
of the result holds ``prompt``, chat messages that ask for the answer in a box, and ``answer``,
whose part after the last "####" the verifier reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_rl.data.jsonl import load_records
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole, written_for_the_user

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def main() -> int:
    """Write the data set; 2 for a mistake in the source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--question-key", default="question")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--instruction", default=INSTRUCTION, help="behind the question")
    arguments = parser.parse_args()
    try:
        count = make(arguments)
    except UserError as error:
        print(f"make_math: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {count} problems")
    return 0


def make(arguments: argparse.Namespace) -> int:
    """Write the problems and return their number; the file appears when all are written."""
    lines = []
    for number, record in enumerate(load_records(arguments.source), start=1):
        texts = []
        for key in (arguments.question_key, arguments.answer_key):
            if not isinstance(record.get(key), str) or not record[key].strip():
                raise UserError(
                    f"{arguments.source}, line {number}: found no text under {key!r}; expected it "
                    f"among {', '.join(record)}; set --question-key or --answer-key"
                )
            texts.append(record[key])
        # one user message: not every chat template has a system message
        content = f"{texts[0].strip()}\n\n{arguments.instruction}"
        messages = [{"role": "user", "content": content}]
        lines.append(json.dumps({"prompt": messages, "answer": texts[1]}, ensure_ascii=False))
    with written_for_the_user(f"--out {arguments.out}", "choose another place"):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out, "\n".join(lines) + "\n")
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
