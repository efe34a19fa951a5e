"""YAML: 1.2 scalars, line numbers, duplicates and malformed files."""

from pathlib import Path

import pytest
import yaml

from megatron_rl.config.yaml_text import dump_yaml, parse_value, read_yaml
from megatron_rl.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("3e-4", 3e-4),
        ("1E6", 1e6),
        ("3.", 3.0),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("none", "none"),
        ("e5", "e5"),
        ("'3'", "3"),
        ("[0, 1]", [0, 1]),
    ],
)
def test_scalars_follow_the_core_schema(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "value", ["3e-4", "no", "010", "1.5", "null", "", "a: b", "x\ny", 3e-4, 1e-6]
)
def test_dumped_values_read_back_the_same(tmp_path, value):
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml({"key": value}), encoding="utf-8")
    data, _ = read_yaml(path)
    assert data == {"key": value} and type(data["key"]) is type(value)


def test_every_key_has_its_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# first\na: 1\nb:\n  c: {d: 2}\n\n  e: 3\n", encoding="utf-8")
    data, lines = read_yaml(path)
    assert data == {"a": 1, "b": {"c": {"d": 2}, "e": 3}}
    assert {key: int(where.rpartition(":")[2]) for key, where in lines.items()} == {
        "a": 2,
        "b": 3,
        "b.c": 4,
        "b.c.d": 4,
        "b.e": 6,
    }


def test_anchors_and_merge_keys_work(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n", encoding="utf-8")
    assert read_yaml(path)[0] == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: 2\na: 3\n",
            ":3: duplicate key a (first on line 1); expected each key once; remove one",
        ),
        ("a:\n  b: 1\n  b: 1\n", ":3: duplicate key a.b (first on line 2); "),
        ("a: 1\nb: [\n", ":3: invalid YAML: "),
        ("\tx: 1", ":1: invalid YAML: "),
        ("a: 1\n b: 2\n", ":2: invalid YAML: "),
        (
            "a: !!python/object:os.system 1\n",
            ":1: invalid YAML: found the tag '!!python/object:os.system'; expected",
        ),
        ("a: \x01\n", ": invalid YAML: "),
        ("- 1\n- 2\n", ": found a sequence at the top; expected `section: ...` lines"),
        ("just text", ": found a scalar at the top; "),
        ('"a\\nb": 2\n', ":1: key 'a\\nb' is no name; expected a field's name"),
        ("k" * 300 + ": 2\n", f":1: key '{'k' * 57}...' is no name; "),
        ("1: 2\n", ":1: key 1 is no name; expected a field's name"),
        ("a:\n  true: 2\n", ":2: key a.true is no name; "),
        ("? [a]\n: 2\n", ":1: key of kind sequence is no name; "),
        ("a: &x\n  b: *x\n", ":1: invalid YAML: the anchor contains itself; expected"),
        ("a: 1\nb: &x\n  - [*x]\n", ":2: invalid YAML: the anchor contains itself; expected"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    missing = tmp_path / "none.yaml"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9\n")
    expected = {
        missing: f"config file {missing} does not exist; expected a YAML file",
        Path("two\nlines"): r"config file two\nlines does not exist; expected a YAML file",
        tmp_path: f"cannot read config file {tmp_path}: Is a directory",
        latin: f"cannot read config file {latin}: not UTF-8 text",
    }
    for path, message in expected.items():
        with pytest.raises(UserError) as error:
            read_yaml(Path(path))
        assert str(error.value) == message


#: 9 lists of 9 aliases of the list before: 3.9e8 values in some 300 characters.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: " + "9" * 5000, ": invalid YAML: a number of 5,000 characters"),
        ("a: !!bool maybe", ": invalid YAML: 'maybe' does not fit the tag '!!bool'"),
        ("a: !!int x", ": invalid YAML: 'x' does not fit the tag '!!int'"),
        ("a: " + "[" * 1000 + "]" * 1000, ": invalid YAML: nested more than 64 deep"),
        ("a: " + "[" * 80 + "]" * 80, ": invalid YAML: nested more than 64 deep"),
        ('a: !!int ""', ": invalid YAML: '' does not fit the tag '!!int'"),
        ("a: !!timestamp x", ": invalid YAML: found the tag '!!timestamp'; expected plain data"),
        ("a: !!binary x", ": invalid YAML: found the tag '!!binary'"),
        ("a: !!set {x, y}", ": invalid YAML: found the tag '!!set'"),
        ("a: !!map [x]", ": invalid YAML: found the tag '!!map'"),
        ("a: 1e999", ": invalid YAML: the number '1e999', too large for a float"),
        ('a: "\\U7fffffff"', ": invalid YAML: an invalid character ("),
        ('a: "\\ud83d"', ": invalid YAML: '\\ud83d' is half a surrogate pair and no character"),
        ("a: [{x: 1, x: 2}]", ": invalid YAML: duplicate key 'x'; expected each key once"),
        ("a: " + "b" * (1 << 18), ": 262,147 bytes, more than 262,144"),
        (BOMB, ": invalid YAML: more than 100,000 values, with aliases written out"),
    ],
)
def test_values_that_python_cannot_take_are_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["9" * 5000, "&a [*a]", "[" * 1000 + "]" * 1000, "!!bool x"])
def test_values_of_flags_that_python_cannot_take(text):
    with pytest.raises(yaml.YAMLError):
        parse_value(text)
