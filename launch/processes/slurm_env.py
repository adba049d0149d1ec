"""A rank's place in a Slurm step, in the variables that torch.distributed, DeepSpeed and NCCL read.

In a step of several tasks each task is a rank, so that `srun msc train …` works in anybody's own batch script; what
`msc submit` starts is no different. All but `choose_interface` are pure functions of the environment.
"""

import re
import socket
from collections.abc import Mapping, Sequence

from . import launcher

FIRST_PORT, PORTS = 10_000, 20_000  # below what Linux gives to outgoing connections (32768 and above)

# What is printed at the start of a job, and nothing else: the environment may hold secrets.
TOLD = ("MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES")  # fmt: skip


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` started, and no other launcher gave it a rank."""
    return "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def hosts(nodelist: str) -> list[str]:
    """Slurm's `n[1-2,07],login` as ["n1", "n2", "n07", "login"]."""
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        names = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            names = [name + piece for name in names for piece in ([plain] if plain else _numbers(ranges))]
        found += names
    return found


def _numbers(ranges: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def port(job: int) -> int:
    """The same on every rank and for every start of a job; neighbouring jobs, which may share a node, differ."""
    return FIRST_PORT + job % PORTS


def peer(names: Sequence[str], node: int) -> str | None:
    """The node to ask the way to, from node number `node`; None where there is only one. Not the own name: many
    systems resolve it to the loopback device."""
    return None if len(names) == 1 else names[-1] if node == 0 else names[0]


def rank_environment(environment: Mapping[str, str], interface: str | None = None) -> dict[str, str]:
    """What a task of a Slurm step must add to its environment to be a rank.

    interface: the network device that leads to the other nodes. What is set already for threads, NCCL and gloo stays.
    """
    names = hosts(environment["SLURM_STEP_NODELIST"])
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    ranks_here = counts[int(environment["SLURM_NODEID"])]
    defaults = {
        "OMP_NUM_THREADS": environment.get("SLURM_CPUS_PER_TASK") or launcher.cores_each(ranks_here),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "NCCL_DEBUG": "WARN",
        # "=" is NCCL's word for exactly this name; without it eth1 would mean eth10, too
        **({"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}),
    }
    # Where each task was given one GPU of its own, that is number 0 to it; else all tasks of a node see all.
    own_gpu = ranks_here > 1 and launcher.visible_gpus(environment) == 1
    return {name: value for name, value in defaults.items() if name not in environment} | {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if own_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(ranks_here),
        "MASTER_ADDR": names[0],
        "MASTER_PORT": str(port(int(environment["SLURM_JOB_ID"]))),
    }


def choose_interface(environment: Mapping[str, str]) -> str | None:
    """The network device that packets to another node of this step leave through; None where it cannot be told."""
    host = peer(hosts(environment["SLURM_STEP_NODELIST"]), int(environment["SLURM_NODEID"]))
    if host is None:
        return None
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: only the route is looked up
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return interface_of(own, {name: [a.address for a in found] for name, found in psutil.net_if_addrs().items()})


def interface_of(address: str, devices: Mapping[str, Sequence[str]]) -> str | None:
    """The device that has an address (IPv6 addresses of devices may end in %DEVICE)."""
    return next((name for name, found in devices.items() if address in [a.partition("%")[0] for a in found]), None)


def describe_rank(environment: Mapping[str, str]) -> str:
    """One line on where this rank is, for the log."""
    place = f"rank {environment['RANK']} of {environment['WORLD_SIZE']}"
    return f"{place}; " + ", ".join(f"{name}={environment[name]}" for name in TOLD if name in environment)
