"""Heartbeat file: ownership of a run after its process stood still; see test_slurm.py for starting in a run folder."""

from __future__ import annotations

import json
import threading
import time

import pytest

from msc.parallel.progress import Progress
from msc.pretrain.tracking import heartbeat


@pytest.mark.parametrize(
    ("stood_still", "phase", "writes", "ends"),
    [
        (True, "report", True, True),
        (True, "report", False, False),  # it was killed: no other process owns the run
        (True, heartbeat.ENDED, False, True),  # it trained, and ended
        (False, "report", True, False),  # no takeover was possible; another process wrote the file by mistake
    ],
)
def test_process_that_stood_still_ends_if_another_owns_the_run(stood_still, phase, writes, ends, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "TAKEOVER_S", 2.0)
    ended = threading.Event()
    monkeypatch.setattr(heartbeat, "_end_taken", lambda run, beat: ended.set())
    write, pauses = heartbeat._write, [2.2] if stood_still else []

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
        while time.monotonic() < until and not ended.is_set():
            (tmp_path / "other").write_text(json.dumps({**other, **({"time": time.time()} if writes else {})}))
            (tmp_path / "other").replace(tmp_path / "heartbeat.json")
            time.sleep(0.02)
    assert ended.is_set() == ends
