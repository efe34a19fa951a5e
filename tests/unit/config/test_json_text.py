"""The reader of JSON: what it takes, and what it says of everything else."""

import json
import os

import pytest

from megatron_rl.config.json_text import BadJson, parse_json, read_json_object
from megatron_rl.errors import UserError
from megatron_rl.files import read_bounded

GOOD = [
    ("null", None),
    (' {"a": [1, -2.5e-3, "\\u00e9", true, {}]} ', {"a": [1, -0.0025, "\u00e9", True, {}]}),
    ('"\\ud83d\\ude00 \u2028"', "\U0001f600 \u2028"),
    ("9" * 300, int("9" * 300)),
    ("-" + "9" * 300, -int("9" * 300)),
    ("-1e308", -1e308),
    ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)),
    (json.dumps("[" * 500), "[" * 500),
    ('"\\\\ud83d"', "\\ud83d"),
]
BAD = [
    ("", "Expecting value, line 1, column 1"),
    ('{"a": 1,\n "b"}', "Expecting ':' delimiter, line 2, column 5"),
    ("{} {}", "Extra data, line 1, column 4"),
    ("'a'", "Expecting value, line 1, column 1"),
    ('"a\nb"', "Invalid control character at, line 1, column 3"),
    ("NaN", "NaN, which is no JSON"),
    ("[-Infinity]", "-Infinity, which is no JSON"),
    ("1e999", "the number 1e999, too large for a float"),
    ("-" + "9" * 5000, "an integer of 5,000 digits, more than 300"),
    ("9" * 301, "an integer of 301 digits, more than 300"),
    ('{"a": 1, "b": {"a": 1, "\\u0062": 2, "b": 3}}', "the key 'b' twice in an object"),
    ("[" * 65 + "]" * 65, "nested more than 64 deep"),
    ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
    ("[" * 200_000, "nested more than 64 deep"),
    ('{"a": "\\ud83d"}', "\\ud83d is half a surrogate pair and no character"),
    ('{"\\uDEAD": 1}', "\\udead is half a surrogate pair and no character"),
]


@pytest.mark.parametrize(("text", "value"), GOOD)
@pytest.mark.parametrize("form", [str, str.encode])
def test_json_is_read(text, value, form):
    assert parse_json(form(text)) == value


@pytest.mark.parametrize(("text", "reason"), BAD)
@pytest.mark.parametrize("form", [str, str.encode])
def test_what_is_no_json_or_out_of_bounds_is_one_line(text, reason, form):
    with pytest.raises(BadJson) as error:
        parse_json(form(text))
    assert str(error.value) == reason


def test_bytes_that_are_no_text():
    for data, reason in (
        (b'"\xff"', "byte 2"),
        (b'"\xed\xa0\xbd"', "byte 2"),
        (b"\xff\xfe", "byte 1"),
    ):
        with pytest.raises(BadJson, match=f"{reason} is not UTF-8"):
            parse_json(data)
    with pytest.raises(BadJson, match="half a surrogate pair"):
        parse_json('"\ud83d"')


def test_a_limit_of_python_that_is_off_changes_nothing(monkeypatch):
    """PYTHONINTMAXSTRDIGITS=0 is allowed, and lets an integer of a million digits take minutes."""
    import sys

    before = sys.get_int_max_str_digits()
    try:
        sys.set_int_max_str_digits(0)
        with pytest.raises(BadJson, match="an integer of 1,000,000 digits"):
            parse_json("9" * 1_000_000)
    finally:
        sys.set_int_max_str_digits(before)


def test_bounds_of_the_caller():
    assert parse_json(b"[[1]]", most_bytes=5, most_levels=2) == [[1]]
    with pytest.raises(BadJson, match="longer than 4 bytes"):
        parse_json(b"[[1]]", most_bytes=4)
    with pytest.raises(BadJson, match="nested more than 1 deep"):
        parse_json(b"[[1]]", most_levels=1)


def test_files_that_are_none(tmp_path):
    pipe, loop, big = tmp_path / "pipe", tmp_path / "loop", tmp_path / "big"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    big.write_bytes(b"")
    os.truncate(big, 1 << 40)  # takes no room
    for path, reason in (
        (pipe, "not a regular file"),
        (loop, "Too many levels of symbolic links"),
        (big, "1,099,511,627,776 bytes, more than 16,777,216"),
        (tmp_path, "Is a directory"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "none", "No such file or directory"),
    ):
        with pytest.raises(OSError, match=reason):
            read_bounded(path, 16 << 20)
        with pytest.raises(UserError, match=f"cannot read {path} .{reason}.*; expected a thing"):
            read_json_object(path, "a thing")
    (tmp_path / "good").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "good", "a thing") == {"a": 1}
    assert read_bounded(tmp_path / "good", 8) == b'{"a": 1}'
