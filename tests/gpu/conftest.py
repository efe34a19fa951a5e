"""Tests on CUDA devices, marked gpu. Each is judged by the same computation on the CPU."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def cuda():
    """Fail, rather than skip, where there is nothing to test on: these tests are asked for.

    In fp32 cuBLAS would round to TF32 for Transformer Engine; the processes started here do not.
    """
    if not torch.cuda.is_available():
        pytest.fail("torch sees no CUDA device; the tests marked gpu need one", pytrace=False)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
