"""Clip extraction for test_convert with sources that kill the worker process that decodes them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from msc.datasets.prepare import clip_extraction as original
from msc.datasets.prepare.clip_extraction import Extraction, ExtractionTask

extract_file = original.extract_file


def extract_or_crash(tasks: list[ExtractionTask]) -> list[Extraction]:
    """Dies on a source called deadly, after its first clip, and the first time on one called hungry."""
    task = tasks[0]
    name = Path(task.source.name).name
    attempted = task.spool.parent / f"attempted {name}"
    if name == "deadly.mp4" or (name == "hungry.mp4" and not attempted.exists()):
        attempted.touch()
        task.clip_file(0).write_bytes(b"half a clip")
        os.kill(os.getpid(), signal.SIGSEGV)
    return extract_file(tasks)
