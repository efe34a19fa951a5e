"""A rank that cannot write its part of a checkpoint, and the others."""

import errno
from unittest import mock

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config


def _save(root, failing):
    """On a rank: save step 1; then step 2, of which rank 1 cannot write ``failing``."""
    cpu_device()
    import torch.distributed as dist

    from megatron_rl.checkpoint import save as saving
    from megatron_rl.checkpoint.directory import newest_checkpoint
    from tests.support.tiny_training import build_training
    from tests.unit.checkpoint.test_save_load import load, save

    training = build_training(tiny_config())
    save(training, root, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch = mock.patch.object(saving, failing, full) if dist.get_rank() == 1 else mock.MagicMock()
    with patch, pytest.raises(OSError, match="No space left on device"):
        save(training, root, 2)
    dist.barrier()
    names = sorted(path.name for path in root.iterdir())
    load(training, newest_checkpoint(root))
    save(training, root, 3)
    return names


@pytest.mark.parametrize("failing", ["_write_own", "save_random_state"])
def test_all_ranks_give_up_together_and_the_old_one_is_intact(tmp_path, failing):
    assert run_on_ranks(2, _save, tmp_path, failing) == [["latest", "step_1"]] * 2
