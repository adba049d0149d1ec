"""The dp × sp mesh: data-parallel rows of ranks, each row sharing one video along time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place: row `dp_rank` of `dp`, and within it `sp_rank` of `sp` along time."""

    dp: int
    sp: int
    dp_rank: int
    sp_rank: int
    sp_group: dist.ProcessGroup


def make_mesh(world: int, sp: int, device_type: str) -> Mesh:
    """Neighbouring ranks share a video, so that the traffic along time stays inside a node first."""
    dp = data_parallel_size(world, sp)
    mesh = init_device_mesh(device_type, (dp, sp), mesh_dim_names=("dp", "sp"))
    if sp > 1:
        # NCCL connects a group in its first call, which none may miss; messages along time are not for all ranks.
        # Not a barrier: in a group that also has gloo that would be gloo's.
        dist.all_reduce(torch.zeros(1, device=device_type), group=mesh.get_group("sp"))
    return Mesh(dp, sp, mesh.get_local_rank("dp"), mesh.get_local_rank("sp"), mesh.get_group("sp"))


def data_parallel_size(world: int, sp: int) -> int:
    """Data-parallel rows of a world; ValueError if `sp` ranks do not share it out evenly."""
    if world % sp:
        raise ValueError(f"{world} processes do not divide into rows of parallel.sp = {sp}")
    return world // sp


def placement_warning(hosts: Sequence[str], sp: int) -> str:
    """What to say where rows lie on more machines than they need to; "" where none does. hosts: of every rank."""
    needed = -(-sp // max(Counter(hosts).values()))
    rows_of_hosts = [set(hosts[first : first + sp]) for first in range(0, len(hosts), sp)]
    if not (many := sum(len(row) > needed for row in rows_of_hosts)):
        return ""
    return (
        f"{many} of {len(rows_of_hosts)} rows of parallel.sp = {sp} ranks lie on more machines than they need to, and "
        "send the past over the network: number ranks machine by machine (srun --distribution=block), and take a "
        "parallel.sp that divides the ranks of a machine"
    )
