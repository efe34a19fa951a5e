import pytest
import torch

from megatron_rl.router.trace import id_dtype, trace_bytes_per_token


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (2, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_the_smallest_type_that_holds_the_ids(experts, dtype):
    assert id_dtype(experts) == dtype
    assert torch.iinfo(dtype).max >= experts - 1


def test_bytes_of_a_token():
    # 48 layers x 8 experts x (1 byte id + 4 bytes log-probability); 2 bytes above 256 experts.
    assert trace_bytes_per_token(48, 8, 128) == 48 * 8 * 5
    assert trace_bytes_per_token(3, 4, 300) == 3 * 4 * 6
