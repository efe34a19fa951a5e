"""What is read from a model directory, and each way it can be damaged: one line that names it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.errors import UserError
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
        ("absolute", "names the file '/.*one.safetensors'; expected the name of a file in"),
        ("index without map", "is damaged .KeyError.; expected a JSON object with 'weight_map'"),
        ("index no json", "is damaged .JSONDecodeError.; expected a JSON object"),
        ("index of another model", "says that one.safetensors holds z, which it does not"),
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
