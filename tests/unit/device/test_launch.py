import pytest

from megatron_rl.device.launch import Launch, read_launch
from megatron_rl.errors import UserError


def test_without_torchrun_the_process_is_alone():
    assert read_launch({"PATH": "/bin"}) == Launch(0, 1, 0, 1, launched=False)


def test_torchrun_variables_are_read():
    environment = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert read_launch(environment) == Launch(9, 16, 1, 8, launched=True)


def test_local_world_size_is_the_world_where_it_is_not_given():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert read_launch(environment).local_world_size == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set and LOCAL_RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is '-1'"),
    ],
)
def test_a_broken_launch_is_refused(environment, message):
    with pytest.raises(UserError) as error:
        read_launch(environment)
    assert str(error.value).startswith(message)
