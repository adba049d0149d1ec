"""The sign of life of a run; who may train in a folder is in test_slurm.py."""

from __future__ import annotations

import json
import time

from msc.pretrain.monitoring import heartbeat


def test_a_run_that_stood_still_ends_if_another_has_taken_its_folder(tmp_path, monkeypatch):
    """Not so where it only stood still, nor at the heartbeat of a process that has ended."""
    monkeypatch.setattr(heartbeat, "FRESH", 0.4)
    met: list[dict] = []
    monkeypatch.setattr(heartbeat, "_end_taken", lambda run, beat: met.append(beat))
    write, stands_still = heartbeat._write, [True]

    def slow(*arguments: object) -> None:
        if stands_still.pop() if stands_still else False:
            time.sleep(0.6)
        write(*arguments)

    monkeypatch.setattr(heartbeat, "_write", slow)
    other = {"time": time.time() + 60, "step": 3, "phase": "report", "since": 0.0, **heartbeat.identity(1), "pid": 1}
    with heartbeat.beating(tmp_path, 1, seconds=0.05):
        time.sleep(0.75)
        assert not met
        for phase in (heartbeat.ENDED, "report"):
            assert not met
            for _ in range(20):  # it may be written over
                (tmp_path / "heartbeat.json").write_text(json.dumps({**other, "phase": phase}))
                time.sleep(0.01)
    assert met and met[0]["pid"] == 1
