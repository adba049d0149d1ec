"""What ranks of test_mixture run: a check of shards that takes longer than the timeout of a collective."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path

from torch.distributed import destroy_process_group, init_process_group

from msc.datasets.loading import mixture
from msc.parallel import control_plane


def slowly(rank, ranks, folder, seconds):
    """What every rank is told, and how many shards it looked at itself."""
    init_process_group("gloo", timeout=timedelta(seconds=2))
    asked, is_file = [], Path.is_file
    Path.is_file = lambda path: (asked.append(path) if path.suffix == ".tar" else None, is_file(path))[1]
    shards = mixture.open_shards(mixture.DataConfig(folder))
    assert not asked
    try:
        told = control_plane.run_on_rank_0(partial(_check, shards, seconds), slow=True)
    except ValueError as error:
        told = str(error)
    destroy_process_group()
    return told, len(asked)


def _check(shards, seconds):
    time.sleep(seconds)
    mixture.check_shard_sizes(shards)
