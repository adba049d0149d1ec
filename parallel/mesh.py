"""Device mesh of dp × sp ranks: data-parallel groups, each of `sp` neighbouring ranks that share videos along time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """The sizes of both axes, and this rank's position on them."""

    dp: int
    sp: int
    dp_rank: int
    sp_rank: int
    sp_group: dist.ProcessGroup


def make_mesh(world_size: int, sp: int, device_type: str) -> Mesh:
    """Neighbouring ranks share a video, so that traffic along time stays inside a node first."""
    dp = data_parallel_size(world_size, sp)
    mesh = init_device_mesh(device_type, (dp, sp), mesh_dim_names=("dp", "sp"))
    if sp > 1:
        # NCCL connects a group in its first collective, which all ranks must join; not all join later messages. Not a
        # barrier, which in a group with two backends would run on gloo.
        dist.all_reduce(torch.zeros(1, device=device_type), group=mesh.get_group("sp"))
    return Mesh(dp, sp, mesh.get_local_rank("dp"), mesh.get_local_rank("sp"), mesh.get_group("sp"))


def data_parallel_size(world_size: int, sp: int) -> int:
    if world_size % sp:
        raise ValueError(f"{world_size} processes do not divide into groups of parallel.sp = {sp}")
    return world_size // sp


def placement_warning(hosts: Sequence[str], sp: int) -> str:
    """A warning where sp groups span more machines than necessary, else "". hosts: of every rank."""
    needed = -(-sp // max(Counter(hosts).values()))
    groups = [set(hosts[first : first + sp]) for first in range(0, len(hosts), sp)]
    if not (many := sum(len(group) > needed for group in groups)):
        return ""
    return (
        f"{many} of {len(groups)} groups of parallel.sp = {sp} ranks span more machines than necessary and send the "
        "past over the network: number ranks machine by machine (srun --distribution=block), and take a parallel.sp "
        "that divides the ranks of a machine"
    )
