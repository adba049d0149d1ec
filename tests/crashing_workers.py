"""What workers of a conversion run in test_convert: `cut`, with sources that kill whoever decodes them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from msc.datasets.prepare import clip_extraction as original
from msc.datasets.prepare.clip_extraction import Cut, Task

cut = original.cut


def crash(task: Task) -> Cut:
    """Dies of a source called deadly, behind a first clip, and of one called hungry the first time."""
    name = Path(task.source.name).name
    tried = task.spool.parent / f"tried {name}"
    if name == "deadly.mp4" or (name == "hungry.mp4" and not tried.exists()):
        tried.touch()
        task.file(0).write_bytes(b"half a clip")
        os.kill(os.getpid(), signal.SIGSEGV)
    return cut(task)
