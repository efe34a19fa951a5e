"""Only ``models/gpt`` knows Megatron-Core's GPTModel, and one other file its weights' names."""

import ast
import re

from tests.unit.test_import_border import FILES, imports, modules_of

WRAPPER = "models/gpt/"
#: The package's own names of weights, which are GPTModel's of Megatron-Core 0.16.
NAMES = "families/common/names.py"

MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
)
#: Parts of GPTModel, as attributes of Python.
ATTRIBUTES = {"decoder", "embedding", "output_layer", "mlp", "self_attention"}
#: The same in names of weights and in keys of checkpoints.
SPELLED = re.compile(
    r"decoder\.|embedding\.word_embeddings|output_layer\.|mlp\.router|experts\.experts|layer_norm_"
)


def strings(tree):
    """The texts of a file but for its docstrings, and the lines they stand in."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.lineno, node.value


def knows_gpt(path):
    """What of GPTModel a file imports, reaches into, or spells."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(one.line, one.module) for one in imports(path) if one.module.startswith(MODULES)]
    found += [
        (node.lineno, f".{node.attr}")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES
    ]
    return found + [(line, text) for line, text in strings(tree) if SPELLED.search(text)]


def test_no_other_file_knows_gptmodel():
    others = {modules_of(path): path for path in FILES}
    others = {name: path for name, path in others.items() if not name.startswith(WRAPPER)}
    knowing = {name for name, path in others.items() if knows_gpt(path)}
    assert knowing == {NAMES}, {name: knows_gpt(others[name]) for name in knowing - {NAMES}}
    assert {one.module for one in imports(others[NAMES])} == {
        "__future__", "__future__.annotations", "re",
    }  # fmt: skip


def test_what_the_search_finds(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        '"""decoder.layers in a docstring."""\n'
        "from megatron.core.models.gpt.gpt_model import GPTModel\n"
        "def f(chunk):\n"
        '    """mlp.router"""\n'
        "    chunk.decoder.layers[0].mlp.router\n"
        '    return f"decoder.layers.{3}.x", "mlp.router.weight"\n'
    )
    assert sorted(set(knows_gpt(path))) == [
        (2, "megatron.core.models.gpt.gpt_model"),
        (2, "megatron.core.models.gpt.gpt_model.GPTModel"),
        (5, ".decoder"),
        (5, ".mlp"),
        (6, "decoder.layers."),
        (6, "mlp.router.weight"),
    ]
    wrapper = [path for path in FILES if modules_of(path).startswith(WRAPPER)]
    assert {modules_of(path) for path in wrapper if knows_gpt(path)} >= {
        f"{WRAPPER}{name}.py" for name in ("chunk", "names", "specs", "transformer_engine")
    }
