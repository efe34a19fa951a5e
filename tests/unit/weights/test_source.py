"""What is read from a model directory, and each way it can be damaged: one line that names it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.errors import UserError
from megatron_rl.families.qwen3_moe import FAMILY
from megatron_rl.weights.source import INDEX, HuggingFaceTensors

A, B = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.bfloat16)


@pytest.fixture
def directory(tmp_path):
    """Two files and their index."""
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B, "c": A + 1}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_by_name(directory):
    source = HuggingFaceTensors(directory)
    assert source.names == {"a", "b", "c"}
    assert torch.equal(source.get("a"), A) and torch.equal(source.get("b"), B)
    assert source.get("b").dtype == torch.bfloat16
    assert source.shape("c") == (2, 3)
    assert source.num_bytes == sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert HuggingFaceTensors(tmp_path).names == {"a"}


def damage(directory, kind):
    first = directory / "one.safetensors"
    if kind == "missing file":
        first.unlink()
    elif kind == "truncated file":
        first.write_bytes(first.read_bytes()[:-8])
    elif kind == "empty file":
        first.write_bytes(b"")
    elif kind == "outside":
        write_index(directory, {"a": "../one.safetensors"})
    elif kind == "absolute":
        write_index(directory, {"a": str(first)})
    elif kind == "index without map":
        (directory / INDEX).write_text("{}")
    elif kind == "index no json":
        (directory / INDEX).write_text("{")
    elif kind == "index of another model":
        write_index(directory, {"a": "one.safetensors", "z": "one.safetensors"})
    elif kind == "type":
        save_file({"a": torch.zeros(2, dtype=torch.int8)}, first)
    elif kind == "nothing":
        for path in directory.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing file", "one.safetensors is missing; expected the file the index names"),
        ("truncated file", "one.safetensors cannot be read .*expected a complete safetensors file"),
        ("empty file", "one.safetensors cannot be read .*it has 0 bytes"),
        ("outside", "names the file '../one.safetensors'; expected the name of a file in"),
        ("absolute", "names the file '/.*; expected the name of a file in"),
        ("index without map", "has no 'weight_map'; expected a JSON object that gives each tensor"),
        (
            "index no json",
            "not valid JSON .Expecting property name.*; expected the index of a model",
        ),
        ("index of another model", "says that one.safetensors holds 'z', which it does not"),
        ("type", "holds a as I8; expected one of F32, BF16, F16; convert the model to bfloat16"),
        ("nothing", f"holds neither {INDEX} nor model.safetensors; expected a model in safetens"),
    ],
)
def test_damage_is_named(directory, kind, message):
    damage(directory, kind)
    with pytest.raises(UserError, match=message) as caught:
        HuggingFaceTensors(directory)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_not_there(directory):
    with pytest.raises(UserError, match="holds no tensor z; expected one, as its config.json"):
        HuggingFaceTensors(directory).get("z")


def with_header(path, header, data=bytes(24), length=None):
    """A safetensors file with this header, which is bytes or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(shape=(10**9, 0, 4), offsets=(0, 0)), "b": entry()}, "holds a without values"),
        ({"two\nlines": entry()}, r"holds a tensor named 'two\\nlines'; expected the name of a"),
        ({"a" * 300: entry()}, "holds a tensor named 'aaa"),
        ({"a": entry(offsets=(0, 48))}, "cannot be read"),
        ({"a": entry(offsets=(8, 32))}, "cannot be read"),
        ({"a": entry(), "b": entry(offsets=(12, 36))}, "cannot be read"),
        ({"a": entry(shape=(2**40, 2**40))}, "cannot be read"),
        ({"a": entry(shape=(-2, -3))}, "cannot be read"),
        ({"a": entry(dtype="F33")}, "cannot be read"),
        ({"a": 3}, "cannot be read"),
        ({"a": entry(dtype="x" * 5000)}, "cannot be read"),
        ({"a": "x" * 5000}, "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_hostile_header_is_one_line(tmp_path, header, reason):
    with_header(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match=reason) as caught:
        HuggingFaceTensors(tmp_path, FAMILY)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**64 - 1])
def test_a_header_of_another_length_is_one_line(tmp_path, length):
    with_header(tmp_path / "model.safetensors", {"a": entry()}, length=length)
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        HuggingFaceTensors(tmp_path)


def test_experts_without_values_are_not_counted(tmp_path):
    """A thousand million of them are 0 bytes of a file."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with_header(
        tmp_path / "model.safetensors", {name: entry(shape=(10**9, 0, 4), offsets=(0, 0))}, b""
    )
    with pytest.raises(UserError, match=f"holds {name} without values, of shape .1000000000, 0"):
        HuggingFaceTensors(tmp_path, FAMILY)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ([], "has no 'weight_map'"),
        ({}, "has no 'weight_map'"),
        ({"a": 3}, "names the file 3; expected the name"),
        ({"a": []}, r"names the file \[\]; expected the name"),
        ({"a": "two\nlines"}, r"names the file 'two\\nlines'; expected"),
        ({"a": "x" * 5000}, "names the file 'xxx|is missing"),
        (
            {"a\nb": "one.safetensors"},
            r"says that one.safetensors holds 'a\\nb', which it does not",
        ),
    ],
)
def test_a_hostile_index_is_one_line(directory, weight_map, reason):
    write_index(directory, weight_map)
    with pytest.raises(UserError, match=reason) as caught:
        HuggingFaceTensors(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"weight_map": ' + b"9" * 5000 + b"}", b"\xff"]
)
def test_an_index_that_python_cannot_take_is_one_line(directory, content):
    (directory / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors.index.json: not valid JSON"):
        HuggingFaceTensors(directory)
