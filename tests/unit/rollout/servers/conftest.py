"""What tests of the engine over servers and of its deliveries begin with."""

import pytest

from tests.support import hugging_face


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return hugging_face.save("qwen3_moe", tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def told():
    return []
