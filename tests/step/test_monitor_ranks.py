"""The monitor on gradients in shards over two gloo processes; what a rank does is in monitor_ranks.py."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import floatline


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    result = tmp_path_factory.mktemp("ranks") / "result.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RESULT": str(result)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(floatline.__file__).parents[1])}
    script = str(Path(__file__).with_name("monitor_ranks.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script], env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return json.loads(result.read_text())


@pytest.mark.parametrize("how", ["sharded", "partly"])
def test_every_rank_sees_the_whole_gradients(ranks: list[dict], how: str) -> None:
    for rank in ranks:
        assert rank[how]["numbers"] == pytest.approx(ranks[0]["whole"]["numbers"], rel=1e-6)
        assert rank[how]["bad"] == [["0.weight", 1, 0, 15]] == rank["whole"]["bad"]
        assert rank[how]["missing"] == ["2.bias"]
        assert math.isnan(rank[how]["rows"][0])
        assert rank[how]["rows"][1] == pytest.approx(rank["whole"]["rows"][1], rel=1e-6)


def test_the_norms_of_all_shards_take_one_exchange(ranks: list[dict]) -> None:
    assert ranks[0]["sharded"]["exchanges"] == 1 == ranks[1]["sharded"]["exchanges"]
    assert ranks[0]["whole"]["exchanges"] == 0
