"""`eagle3-offline serve`: up, with what follows --, on the loopback; a signal ends it and its children."""

import json
import signal

import httpx
import psutil

from eagle3_offline.machine import free_port

from ..small_runs import Cli, conversations, write_recipe


def test_serve_until_a_signal_comes(sglang, random_target, tmp_path):
    cli = Cli(write_recipe(tmp_path, random_target, conversations(1)), tmp_path / "run")
    port = free_port()
    more = ("--", "--max-running-requests", "3", "--served-model-name=mine")
    process = cli.start("serve", "--json", "--port", str(port), more=more)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving"):
                break
        assert f"http://127.0.0.1:{port} is up" in "".join(lines), lines
        info = httpx.get(f"http://127.0.0.1:{port}/server_info").json()
        assert info["max_running_requests"] == 3 and info["served_model_name"] == "mine" and info["host"] == "127.0.0.1"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # the supervisor, the server, its scheduler and its detokenizer
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0 and json.loads(output.splitlines()[-1]) == {"stage": "serve", "servers": 1}
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)
    assert (cli.run / "logs" / "server-0.log").is_file()
