"""A configuration that needs what this kind of server cannot do."""

import pytest

from megatron_rl.rollout.engine import EngineParts
from megatron_rl.rollout.servers.server_engine import ServerEngine
from megatron_rl.rollout.servers.sglang import SglangApi
from tests.support import hugging_face
from tests.support.server_engine import build, config_of


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"sync": "broadcast"}, "sync broadcast needs servers that take a broadcast"),
        ({"urls": (), "start": 1}, "servers.start needs the command of a server"),
    ],
)
def test_what_a_kind_of_server_cannot_do_is_refused(tmp_path, update, message):
    directory = hugging_face.save("qwen3_moe", tmp_path / "model")
    config = config_of(directory, tmp_path / "run", ["http://127.0.0.1:1"])
    _, chunks, groups, _ = build(config, [])
    servers = config.rollout.servers.model_copy(update=update)
    rollout = config.rollout.model_copy(update={"servers": servers})
    parts = EngineParts(config.model_copy(update={"rollout": rollout}), chunks, groups, (1,), str)
    with pytest.raises(ValueError, match=message):
        ServerEngine(parts, SglangApi(config.model))
