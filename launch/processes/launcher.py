"""Start the ranks of one command as processes on this machine and look after them until all have ended.

Every rank gets its own session, so that Ctrl-C in a terminal reaches only this launcher, which hands each
kind of signal on once: a rank that is saving a checkpoint must not be interrupted by a second copy.
Rank 0 keeps the terminal (the progress bar); the other ranks write to log files.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from msc.parallel.signals import STOP_SIGNALS, collect_signals

# What a rank runs. Not `-m msc.launch.cli`: under -m cloudpickle sends classes by value.
PROGRAM = "import sys; from msc.launch.cli import main; sys.exit(main())"
POLL_SECONDS = 0.05
TAIL_LINES = 20
TAIL_BYTES = 16_000

# Set in the ranks started here: their parent has already checked the configuration and the run folder.
LAUNCHED = "MSC_LAUNCHED"


@dataclass(frozen=True)
class Rank:
    """A started rank; `log` is None for rank 0, `start` is where this launch begins in the log (bytes)."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    start: int = 0


def msc_command(arguments: Sequence[str], python: str = sys.executable) -> list[str]:
    """The program and arguments of `msc ARGUMENTS`."""
    return [python, "-c", PROGRAM, *arguments]


def free_port() -> int:
    """A TCP port of the loopback address that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs a process would see, without importing torch (seconds)."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA itself stops reading at the first invalid entry, which is how "-1" hides all GPUs.
        invalid = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return invalid
    return sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))


def gpu_shares(environment: Mapping[str, str], jobs: int, processes: int) -> list[str]:
    """For each of `jobs` commands at a time the CUDA_VISIBLE_DEVICES of its own `processes` GPUs; "" for all of them
    where no GPU is visible. ValueError if there are GPUs, but too few."""
    count = visible_gpus(environment)
    if not count:
        return [""] * jobs
    if count < jobs * processes:
        raise ValueError(
            f"{jobs} runs at a time of {processes} processes need {jobs * processes} GPUs, but {count} are visible: "
            "fewer --jobs, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1"
        )
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if listed is None else [name.strip() for name in listed.split(",")]
    return [",".join(names[i * processes : (i + 1) * processes]) for i in range(jobs)]


def process_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what every process of training needs, however it is started."""
    programs = str(Path(sys.executable).parent)  # not resolved: in a virtual environment this is a link
    path = base.get("PATH", os.defpath)
    return {
        # When a rank is lost, torch's C++ side of the others would bury the one line on it under stack traces.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **base,
        # The current folder stays out of sys.path: a folder `datasets` there must not become a module.
        "PYTHONSAFEPATH": "1",
        # A rank that is killed must not take its last words along; one that crashes says where.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # DeepSpeed compiles its CPU communication with ninja, which pip installs beside python.
        "PATH": path if path.split(os.pathsep)[0] == programs else programs + os.pathsep + path,
    }


def cores_each(ranks: int) -> str:
    """An own share of this machine's cores for each of its ranks, as OMP_NUM_THREADS takes it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, cores // ranks))


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one rank: `base`, the variables that torch.distributed and DeepSpeed read, and
    an own share of the cores. Values already in `base` win for OMP_NUM_THREADS and TORCH_CPP_LOG_LEVEL only."""
    return {
        "OMP_NUM_THREADS": cores_each(ranks),
        **process_environment(base),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def die_with_parent() -> Callable[[], None] | None:
    """Something to run between fork and exec: the kernel kills the rank when the launcher dies, however
    it dies. Linux only; elsewhere a launcher killed with SIGKILL leaves its ranks behind."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the launcher died before the line above
            os._exit(1)

    return prepare


def start(command: Sequence[str], ranks: int, logs: Path, environment: Mapping[str, str]) -> list[Rank]:
    """Start `command` once for each rank. Logs are appended to: a resumed run keeps what went before."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    prepare = die_with_parent()
    started: list[Rank] = []
    try:
        for rank in range(ranks):
            environ = {**rank_environment(environment, rank, ranks, port), LAUNCHED: "1"}
            if rank == 0:
                process = subprocess.Popen(
                    command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare
                )
                started.append(Rank(rank, process, None))
                continue
            log = logs / f"rank_{rank}.log"
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=prepare,
                )
                started.append(Rank(rank, process, log, out.tell()))
    except BaseException:
        kill(started, signal.SIGKILL)
        for rank_started in started:
            rank_started.process.wait()
        raise
    return started


def kill(ranks: Sequence[Rank], number: int, groups: bool = True) -> None:
    """Send a signal to ranks not yet waited for; with `groups` to all that each of them has started, too."""
    for rank in ranks:
        # The rank leads its session, so its pid names its group. Until it has been waited for, also when it
        # has ended, the kernel gives that number to nobody else.
        with suppress(ProcessLookupError, PermissionError):
            (os.killpg if groups else os.kill)(rank.process.pid, number)


def tail(rank: Rank) -> list[str]:
    """The last lines that a rank wrote in this launch (none for rank 0, whose output is on the terminal)."""
    if rank.log is None:
        return []
    with rank.log.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(rank.start, end - TAIL_BYTES))
        return log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def describe_end(rank: Rank) -> str:
    code = rank.process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank.rank} {how}"


def explain(failed: Sequence[Rank], tails: int = 2) -> str:
    """What to tell the user about the ranks that failed by themselves, in the order in which they ended."""
    lines = []
    for position, rank in enumerate(failed):
        where = f"see {rank.log}" if rank.log else "its output is above"
        lines.append(f"msc: {describe_end(rank)}; {where}")
        if position < tails and (said := tail(rank)):
            lines += [f"  [rank {rank.rank}] {line}" for line in said]
    return "\n".join(lines)


def run(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    grace: float = 10.0,
    received: list[int] | None = None,
) -> int:
    """Run `command` as `ranks` ranks and wait for all of them.

    When one fails, the others get `grace` seconds to notice by themselves (they then say more useful things),
    then SIGTERM, then after as long again SIGKILL. After a forwarded signal they are ending already and may
    be saving a checkpoint: then there is only the SIGKILL, after ten times as long. A second Ctrl-C kills at
    once.
    Returns 0, or the code of the rank that failed first, as a shell counts it (128 + signal).
    """
    with collect_signals() if received is None else nullcontext(received) as received:
        started = start(command, ranks, logs, os.environ if environment is None else environment)
        running = list(started)
        try:
            failed, forwarded = _wait(running, received, grace)
        finally:  # after an error here, too, nothing stays behind
            kill(running, signal.SIGKILL)
            for rank in running:
                rank.process.wait()
    if not failed:
        return 0
    codes = {rank.process.returncode for rank in started}
    stopped_together = forwarded and len(codes) == 1  # as they were told: nothing to explain
    if not stopped_together:
        print(explain(failed), file=sys.stderr, flush=True)
    code = int(failed[0].process.returncode)
    return 128 - code if code < 0 else code


def _wait(running: list[Rank], received: Sequence[int], grace: float) -> tuple[list[Rank], bool]:
    """Until all ranks have ended: (those that failed of themselves, first one first; whether a signal came).
    Takes every rank that has ended out of `running`."""
    failed: list[Rank] = []
    forwarded: set[int] = set()
    ended_by_us: set[int] = set()
    failed_at = time.monotonic()
    while running:
        for number in STOP_SIGNALS:
            if number in received and number not in forwarded:
                forwarded.add(number)
                kill(running, number, groups=False)
        if received.count(signal.SIGINT) > 1 and signal.SIGKILL not in ended_by_us:
            ended_by_us.add(signal.SIGKILL)
            kill(running, signal.SIGKILL)

        for rank in list(running):
            if not _has_ended(rank):
                continue
            kill([rank], signal.SIGKILL)  # what it left running, such as loader workers
            code = rank.process.wait()
            running.remove(rank)
            if code == 0 or (ended_by_us and failed):
                continue
            if not failed:
                failed_at = time.monotonic()
                if running and not forwarded:
                    print(f"msc: {describe_end(rank)}; ending the others", file=sys.stderr, flush=True)
            failed.append(rank)

        waited = time.monotonic() - failed_at if failed else 0.0
        if waited > grace and not forwarded and not ended_by_us:
            ended_by_us.add(signal.SIGTERM)
            kill(running, signal.SIGTERM, groups=False)
        if waited > grace * (10 if forwarded else 2) and signal.SIGKILL not in ended_by_us:
            ended_by_us.add(signal.SIGKILL)
            kill(running, signal.SIGKILL)
        if running:
            time.sleep(POLL_SECONDS)
    return failed, bool(forwarded)


def _has_ended(rank: Rank) -> bool:
    """Whether the rank has ended, without waiting for it and without freeing its process id."""
    return os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
