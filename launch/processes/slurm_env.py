"""Slurm environment: a task's rank in a Slurm step, in the variables that torch.distributed, DeepSpeed and NCCL read.

In a step of several tasks each task is a rank, so that `srun msc train …` works in anybody's own batch script; what
`msc submit` starts is no different. All but `choose_interface` are pure functions of the environment.

Not submitit's TorchDistributedEnvironment: it reads the job's variables instead of the step's, takes the same number of
tasks on every node for granted, and picks ports that Linux also gives to outgoing connections.
"""

import re
import socket
from collections.abc import Mapping, Sequence

from . import launcher

FIRST_PORT, PORTS = 10_000, 20_000  # below what Linux gives to outgoing connections (32768 and above)

# What is printed at the start of a job, and nothing else: the environment may hold secrets.
SHOWN = ("MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS",
         "CUDA_VISIBLE_DEVICES")  # fmt: skip


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` started, and no other launcher gave it a rank."""
    return "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def hosts(nodelist: str) -> list[str]:
    """Slurm's `n[1-2,07],login` as ["n1", "n2", "n07", "login"]."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            expanded = [name + end for name in expanded for end in ([plain] if plain else _numbers(ranges))]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """`07-09,12` as ["07", "08", "09", "12"]."""
    bounds = [(first, last or first) for first, _, last in (part.partition("-") for part in ranges.split(","))]
    return [str(n).zfill(len(first)) for first, last in bounds for n in range(int(first), int(last) + 1)]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    return [
        int(count) for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(repeats or 1))
    ]


def rank_environment(environment: Mapping[str, str], interface: str | None = None) -> dict[str, str]:
    """What a task of a Slurm step must add to its environment to be a rank.

    interface: the network device that leads to the other nodes. What is set already for threads, NCCL and gloo stays.
    """
    ranks_here = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    defaults = {
        "OMP_NUM_THREADS": environment.get("SLURM_CPUS_PER_TASK") or launcher.cores_each(ranks_here),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "NCCL_DEBUG": "WARN",
        # to NCCL "=" means exactly this name; without it eth1 would mean eth10, too
        **({"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}),
    }
    # Where each task was given one GPU of its own, that is number 0 to it; else all tasks of a node see all.
    own_gpu = ranks_here > 1 and launcher.visible_gpus(environment) == 1
    return {name: value for name, value in defaults.items() if name not in environment} | {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if own_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(ranks_here),
        "MASTER_ADDR": hosts(environment["SLURM_STEP_NODELIST"])[0],
        # the same on every rank and for every start of a job; neighbouring jobs, which may share a node, differ
        "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS),
    }


def choose_interface(environment: Mapping[str, str]) -> str | None:
    """The network device with the route to another node of this step; None where that is unknown."""
    names, node = hosts(environment["SLURM_STEP_NODELIST"]), int(environment["SLURM_NODEID"])
    if len(names) == 1:
        return None
    import psutil

    try:
        # not to the own name, which many systems resolve to the loopback device
        host = names[-1] if node == 0 else names[0]
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: only the route is looked up
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return interface_of(own, {name: [a.address for a in of] for name, of in psutil.net_if_addrs().items()})


def interface_of(address: str, devices: Mapping[str, Sequence[str]]) -> str | None:
    """The device that has an address (IPv6 addresses of devices may end in %DEVICE)."""
    return next((name for name, own in devices.items() if address in [a.partition("%")[0] for a in own]), None)


def describe_rank(environment: Mapping[str, str]) -> str:
    """One line for the log on this rank's place and network."""
    variables = ", ".join(f"{name}={environment[name]}" for name in SHOWN if name in environment)
    return f"rank {environment['RANK']} of {environment['WORLD_SIZE']}; {variables}"
