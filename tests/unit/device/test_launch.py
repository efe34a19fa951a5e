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


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("[::1]", ("::1", 29500)),
        ("::1", ("::1", 29500)),
        ("fe80::1%eth0", ("fe80::1%eth0", 29500)),
        ("node0.cluster", ("node0.cluster", 29500)),
        ("10.0.0.2", ("10.0.0.2", 29500)),
    ],
)
def test_ranks_meet_at_an_address_with_or_without_brackets(host, place):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": host, "MASTER_PORT": "29500"}
    assert read_launch(environment).master == place


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("node0", "port"),
        ("node0", "0"),
        ("node0", "65536"),
        ("node0", ""),
        ("", "29500"),
        ("[::1", "29500"),
        ("tcp://node0", "29500"),
        ("node 0", "29500"),
    ],
)
def test_a_malformed_place_to_meet_is_refused(host, port):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    with pytest.raises(UserError) as error:
        read_launch(environment)
    assert str(error.value).startswith(f"MASTER_ADDR:MASTER_PORT is '{host}:{port}'; expected HOST")


def test_a_number_of_more_digits_than_python_reads_is_refused():
    with pytest.raises(UserError, match="RANK is '999"):
        read_launch({"RANK": "9" * 5000, "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
