"""Reading JSONL files: every mistake is one line that names the file and the line."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.data import jsonl
from megatron_rl.data.jsonl import load_records
from megatron_rl.errors import UserError

ROOT = Path(__file__).parents[3]


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_load_records(tmp_path):
    path = write(tmp_path, '{"a": 1}', '{"b": "\u2028 \u00e9"}', "", " ")
    assert load_records(path) == [{"a": 1}, {"b": "\u2028 \u00e9"}]
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n\r\n')
    assert load_records(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\\ud83d\\ude00"}')
    assert load_records(path) == [{"a": 1}, {"a": "\U0001f600"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("{}", "{a}"),
            r"data.jsonl, line 2: not JSON \(Expecting property name .*, line 1, column 2\)",
        ),
        (("{}", "", "{}"), r"data.jsonl, line 2: not JSON"),
        (("{}", "[1]"), r"data.jsonl, line 2: a JSON list; expected an object"),
        (("{}", "{}", "3"), r"data.jsonl, line 3: a JSON int; expected an object"),
        (("[" * 100_000,), r"data.jsonl, line 1: not JSON"),
        (
            ("{}", '{"a": ' + "9" * 5000 + "}"),
            r"data.jsonl, line 2: not JSON \(an integer of 5,000 digits, more",
        ),
        (('{"a": NaN}',), r"data.jsonl, line 1: not JSON \(NaN, which is no JSON\)"),
        (('{"a": 1e999}',), r"data.jsonl, line 1: not JSON \(the number 1e999, too large"),
        (('{"a": ' + "9" * 400 + "}",), r"data.jsonl, line 1: not JSON \(an integer of 400 digits"),
        (('{"a": 1, "a": 2}',), r"data.jsonl, line 1: not JSON \(the key 'a' twice in an object"),
        (('{"a": ' + "[" * 70 + "]" * 70 + "}",), r"line 1: not JSON \(nested more than 64 deep"),
        (("",), r"data.jsonl: empty data set"),
        (
            ("{}", '{"a": "b \\ud83d c"}'),
            r"data.jsonl, line 2: not JSON \(\\ud83d is half a surrogate pair",
        ),
        (
            ('{"a": ["\\uDE00"]}',),
            r"data.jsonl, line 1: not JSON \(\\ude00 is half a surrogate pair",
        ),
        (('{"\\udead": 1}',), r"data.jsonl, line 1: not JSON \(\\udead is half a surrogate pair"),
    ],
)
def test_bad_lines(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        load_records(write(tmp_path, *lines))
    assert "\n" not in str(caught.value)
    str(caught.value).encode("utf-8")  # it can be printed


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is no regular file; expected a JSONL file"):
        load_records(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}')
    with pytest.raises(UserError, match="latin.jsonl, line 2: not JSON .byte 8 is not UTF-8."):
        load_records(tmp_path / "latin.jsonl")


def test_a_line_that_is_too_long(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(50 * 2**20)  # zero bytes
    with pytest.raises(UserError, match="long.jsonl, line 2: longer than 16 MiB; expected one"):
        load_records(path)
    assert jsonl.MAX_LINE_BYTES == 16 * 2**20
    fits = json.dumps({"a": "b" * 2**20})
    assert load_records(write(tmp_path, fits)) == [{"a": "b" * 2**20}]


def limited(path, kind, most):
    """What a process of that limit says when it loads the file."""
    code = (
        "import sys\nfrom megatron_rl.data.jsonl import load_records\n"
        "from megatron_rl.errors import UserError\n"
        "try:\n    print(len(load_records(sys.argv[1])))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(kind, (most, most)),
    )
    assert done.stderr == ""
    return done.stdout


def test_memory_that_is_limited(tmp_path):
    path = write(tmp_path, *[json.dumps({"a": "b" * 2**20})] * 60)
    assert limited(path, resource.RLIMIT_AS, 4 * 2**30) == "60\n"
    said = limited(path, resource.RLIMIT_AS, 64 * 2**20)
    assert said.startswith(f"{path}, line ") and said.count("\n") == 1
    assert ": out of memory; expected room for the whole data set" in said


def test_a_file_that_may_not_be_opened(tmp_path):
    path = write(tmp_path, '{"a": 1}')
    descriptors = 3  # standard input, output and error: none is left
    code = (
        "import resource, sys\nfrom megatron_rl.data.jsonl import load_records\n"
        "from megatron_rl.errors import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
        "try:\n    load_records(sys.argv[1])\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith(f"{path}, line 1: cannot be read (Too many open files); expected")
