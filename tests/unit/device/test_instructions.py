"""What /proc/cpuinfo says of bf16."""

import pytest

from megatron_rl.device.instructions import has_bf16, slow_type


def machine(root, text):
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 avx512f\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor\t: 0\nmodel name\t: flags avx512_bf16\n", None),
        ("flags\t\t: fpu not_avx512_bf16\n", False),
    ],
)
def test_flags_are_whole_words_of_their_line(tmp_path, text, expected):
    root = machine(tmp_path, text)
    assert has_bf16(root) is expected
    said = slow_type("bf16", root)
    assert (said is not None) == (expected is False)
    assert said is None or said.endswith("set model.dtype to fp32")
    assert slow_type("fp32", root) is None


def test_a_machine_without_that_file_says_nothing(tmp_path):
    assert has_bf16(tmp_path) is None and slow_type("bf16", tmp_path) is None
