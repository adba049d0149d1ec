"""Benchmarks that nothing else runs still start and end; what they measure here means nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
# One rank of two has no memory left where the heads are dealt out.
FAULT = """
made = several_gpus.training_step
def training_step(args, world, mesh, job):
    if world.rank == 1 and job["layouts"] == "ulysses":
        raise several_gpus.torch.OutOfMemoryError
    return made(args, world, mesh, job)
several_gpus.training_step = training_step
several_gpus.rank()
"""
PROGRAM = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import several_gpus
several_gpus.RANK = several_gpus.RANK.removesuffix("several_gpus.rank()") + {FAULT!r}
several_gpus.main()
"""


def several_gpus(*words):
    command = [sys.executable, "-c", PROGRAM, "--device", "cpu", "--preset", "demo", "--depth", "1", "--side", "16",
               "--runs", "1", *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.gloo
def test_scaling_over_several_ranks_is_told_row_by_row_past_one_that_fails():
    said = several_gpus("--frames", "4", "--ranks", "1", "2")
    rows = [line.strip("|").split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    assert {len(row) for row in rows} == {13}
    found = {tuple(cell.strip() for cell in row[:5]): [cell.strip() for cell in row[5:]] for row in rows}
    alone = [("one", scales, "", "1", tokens) for scales in ("multi-scale", "dense") for tokens in ("64", "128")]
    shared = [("multi-scale", "halo"), *(("dense", layout) for layout in ("halo", "ulysses", "ring"))]  # auto: halos
    assert [*found] == alone + [
        (scaling, scales, layout, "2", "128") for scales, layout in shared for scaling in ("weak", "strong")
    ]
    for (scaling, _, layout, *_), (step, *_, efficiency, by_flops, hidden, _) in found.items():
        if layout == "ulysses":
            assert step == "out of memory"
            continue
        assert float(step) > 0
        shares = [efficiency, by_flops, hidden]
        assert shares == ["", "", ""] if scaling == "one" else all(share.endswith("%") for share in shares)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_long_clip_is_trained_on_all_ranks():
    said = several_gpus("--longest", "128", "--ranks", "2")
    first, last = map(float, re.search(r"at step 1: (\S+), at step \d+: (\S+)", said).groups())
    assert "| longest | multi-scale | halo | 2 | 128 |" in said and last < first
