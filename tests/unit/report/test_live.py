"""The page of a run that goes on: what the server gives, and to whom."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.report.live import ReportServer
from tests.support.pages import charts_of, data_of
from tests.support.runs import ROOT


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return tmp_path


@pytest.fixture
def server(run_dir):
    with ReportServer(run_dir) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET", host=None):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode()
    connection.close()
    return status, text


def add(run_dir, step, loss):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def test_a_page_gets_each_record_once(server, run_dir):
    status, text = ask(server, "/")
    assert status == 200 and charts_of(text) == {} and ">no step yet<" in text
    have = data_of(text)["version"]
    assert ask(server, f"/data.json?have={have}") == (204, "")
    for step, losses in ((1, [0.5]), (2, [0.5, 0.25])):
        add(run_dir, step, 0.5 / step)
        status, text = ask(server, f"/data.json?have={have}")
        data = json.loads(text)
        (chart,) = [chart for group in data["groups"] for chart in group["charts"]]
        assert status == 200 and chart["id"] == "loss" and chart["series"][0]["values"] == losses
        assert data["version"] != have
        have = data["version"]
        assert ask(server, f"/data.json?have={have}") == (204, "")
    assert data["summary"] == "loss 0.5 -> 0.25, 2 steps in 0.0s"
    assert "<dt>Length</dt><dd>2 steps in 0.0s</dd>" in data["facts"]


def test_a_torn_last_line_is_not_shown_and_a_broken_file_is_said(server, run_dir):
    add(run_dir, 1, 0.5)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    text = ask(server, "/data.json")[1]
    assert json.loads(text)["groups"][0]["charts"][0]["series"][0]["steps"] == [1]
    (run_dir / "metrics.jsonl").write_text('{"step": -1}\n{"step": 2}\n')
    status, text = ask(server, "/data.json")
    assert status == 503 and "line 1 holds" in text


def test_nothing_else_is_served_and_to_nobody_else(server, run_dir):
    (run_dir / "secret.txt").write_text("secret")
    port = server.server_address[1]
    assert server.server_address[0] == "127.0.0.1"
    for path in ("/secret.txt", "/metrics.jsonl", "/../secret.txt", "/data.json/"):
        status, text = ask(server, path)
        assert status == 404 and "secret" not in text
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example:80", "x"):
        assert ask(server, "/data.json", host=host) == (403, "found another host\n")
    assert ask(server, "/data.json", host=f"localhost:{port}")[0] == 200
    assert ask(server, "/", method="POST")[0] == 501


def test_what_is_no_run_or_no_port_is_refused(run_dir, tmp_path, capsys):
    with pytest.raises(UserError, match="holds no config.yaml"):
        ReportServer(tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["report", "--watch", str(run_dir), "--port", str(port)]) == 2
    assert f"--port {port} cannot be used (Address already in use)" in capsys.readouterr().err
    for words, told in (
        (["--watch", "a", "b"], "--watch with 2 runs; expected one RUN_DIR"),
        (["a", "--port", "1"], "found --port without --watch"),
        (["a", "--watch", "--port", "65536"], "--port is '65536'; expected 0 to 65535"),
    ):
        assert main(["report", *words]) == 2
        assert told in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(run_dir):
    add(run_dir, 1, 0.5)
    command = [sys.executable, "-m", "megatron_rl", "report", "--watch", str(run_dir)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # As from a terminal, even where these tests run in the background, which ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:") and address.endswith("/")
        connection = http.client.HTTPConnection(address[7:-1], timeout=30)
        connection.request("GET", "/")
        assert charts_of(connection.getresponse().read().decode())["loss"]["series"]
        connection.close()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
