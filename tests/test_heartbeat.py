"""The sign of life of a run; who may train in a folder is in test_slurm.py."""

from __future__ import annotations

import json
import threading
import time

import pytest

from msc.parallel.progress import Progress
from msc.pretrain.tracking import heartbeat


@pytest.mark.parametrize(
    ("stands_still", "phase", "beats", "ends"),
    [
        (True, "report", True, True),
        (True, "report", False, False),  # it was killed: nobody else has the run
        (True, heartbeat.ENDED, False, True),  # it has trained on, and ended
        (False, "report", True, False),  # nobody was taken for dead; the file's is another's by some mistake
    ],
)
def test_a_run_that_stood_still_ends_if_another_has_taken_its_folder(
    stands_still, phase, beats, ends, tmp_path, monkeypatch
):
    monkeypatch.setattr(heartbeat, "TAKEOVER_S", 2.0)
    met = threading.Event()
    monkeypatch.setattr(heartbeat, "_end_taken", lambda run, beat: met.set())
    write, pauses = heartbeat._write, [2.2] if stands_still else []

    def slow(*arguments: object) -> None:
        if pauses:
            time.sleep(pauses.pop())
        write(*arguments)

    monkeypatch.setattr(heartbeat, "_write", slow)
    with heartbeat.write_heartbeat(tmp_path, 1, Progress(), interval=0.2):
        while not heartbeat.read(tmp_path):
            time.sleep(0.01)
        other = {**heartbeat.identity(1), "pid": 1, "step": 3, "phase": phase, "since": 0.0, "time": time.time()}
        until = time.monotonic() + (1.8 if ends else 1.0)
        while time.monotonic() < until and not met.is_set():
            (tmp_path / "other").write_text(json.dumps({**other, **({"time": time.time()} if beats else {})}))
            (tmp_path / "other").replace(tmp_path / "heartbeat.json")
            time.sleep(0.02)
    assert met.is_set() == ends
