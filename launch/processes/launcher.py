"""Process launcher: starts the ranks of one command on this machine and waits until all have ended.

Every rank gets its own session, so that Ctrl-C in a terminal reaches only this launcher, which forwards each
kind of signal once: a rank that is saving a checkpoint must not be interrupted by a second copy.
Rank 0 keeps the terminal (the progress bar); the other ranks write to log files.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from msc.parallel.signals import STOP_SIGNALS, collect_signals

log = logging.getLogger(__name__)

# What a rank runs. Not `-m msc.launch.cli`: under -m cloudpickle sends classes by value.
PROGRAM = "import sys; from msc.launch.cli import main; sys.exit(main())"
# Set in the ranks started here: their parent has already checked the configuration and the run folder.
LAUNCHED = "MSC_LAUNCHED"
POLL_SECONDS = 0.05
TAIL_LINES, TAIL_BYTES = 20, 16_000
SHOWN_TAILS = 2  # of failed ranks


@dataclass(frozen=True)
class Rank:
    """A started rank. log: None for rank 0. log_start: where this launch begins in the log (bytes)."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int = 0


def msc_command(arguments: Sequence[str], python: str = sys.executable) -> list[str]:
    """The program and arguments of `msc ARGUMENTS`."""
    return [python, "-c", PROGRAM, *arguments]


def free_port() -> int:
    """A TCP port of the loopback address that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def gpu_names(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs that a process sees, as CUDA_VISIBLE_DEVICES names them, without importing torch (seconds)."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, range(sum(path.name[6:].isdigit() for path in devices.glob("nvidia*")))))
    # CUDA itself stops reading at the first invalid entry, which is how "-1" hides all GPUs.
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    return len(gpu_names(environment, devices))


def gpu_shares(environment: Mapping[str, str], jobs: int, processes: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of `jobs` commands at a time, with `processes` GPUs of its own; "" for all of them
    where no GPU is visible. ValueError if there are GPUs, but too few."""
    names = gpu_names(environment)
    if names and len(names) < jobs * processes:
        raise ValueError(
            f"{jobs} runs at a time of {processes} processes need {jobs * processes} GPUs, but {len(names)} are "
            "visible: fewer --jobs, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1"
        )
    return [",".join(names[i * processes : (i + 1) * processes]) for i in range(jobs)]


def process_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what every training process needs, whoever starts it."""
    programs = str(Path(sys.executable).parent)  # not resolved: in a virtual environment this is a link
    path = base.get("PATH", os.defpath)
    return {
        # When a rank is lost, torch's C++ side of the others would hide the one line on it among stack traces.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **base,
        # The current folder stays out of sys.path: a folder `datasets` there must not become a module.
        "PYTHONSAFEPATH": "1",
        # The output of a rank that is killed must not be lost in a buffer; one that crashes prints its stack.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # DeepSpeed compiles its CPU communication with ninja, which pip installs beside python.
        "PATH": path if path.split(os.pathsep)[0] == programs else programs + os.pathsep + path,
    }


def cores_each(ranks: int) -> str:
    """OMP_NUM_THREADS that divides this machine's cores among its ranks."""
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
    """A function to run between fork and exec: the kernel then kills the rank when the launcher dies, however
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


def start_ranks(command: Sequence[str], ranks: int, logs: Path, environment: Mapping[str, str]) -> list[Rank]:
    """Start `command` once for each rank. Logs are appended to: a resumed run keeps what went before."""
    logs.mkdir(parents=True, exist_ok=True)
    port, prepare = free_port(), die_with_parent()
    started: list[Rank] = []
    try:
        for rank in range(ranks):
            path = logs / f"rank_{rank}.log" if rank else None
            with path.open("ab") if path else nullcontext() as out:
                process = subprocess.Popen(
                    command,
                    env={**rank_environment(environment, rank, ranks, port), LAUNCHED: "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT if out else None,
                    start_new_session=True,
                    preexec_fn=prepare,
                )
                started.append(Rank(rank, process, path, out.tell() if out else 0))
    except BaseException:
        kill_and_wait(started)
        raise
    return started


def send_signal(ranks: Sequence[Rank], number: int) -> None:
    """Send a signal to ranks not yet waited for; SIGKILL also to all processes that they have started."""
    for rank in ranks:
        # The rank leads its session, so its pid names its group. Until it has been waited for, also when it
        # has ended, the kernel gives that number to no other process.
        with suppress(ProcessLookupError, PermissionError):
            (os.killpg if number == signal.SIGKILL else os.kill)(rank.process.pid, number)


def kill_and_wait(ranks: Sequence[Rank]) -> None:
    send_signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def describe_end(rank: Rank) -> str:
    code = rank.process.returncode
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank.rank} {end}"


def log_tail(log: Path, start: int) -> list[str]:
    """The last lines of a rank's log after byte `start`: its last message and what follows, such as a traceback, not
    the stacks before a message of the watchdog."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    last_message = max((i for i, line in enumerate(lines) if line.startswith("msc: ")), default=0)
    return lines[last_message:][-TAIL_LINES:]


def run(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    grace: float = 10.0,
    received: list[int] | None = None,
) -> int:
    """Run `command` as `ranks` ranks and wait for all of them.

    When one fails, the others get `grace` seconds to notice by themselves (their messages are then more useful),
    then SIGTERM, then after as long again SIGKILL. After a forwarded signal they are ending already and may
    be saving a checkpoint: then there is only the SIGKILL, after ten times as long. A second Ctrl-C kills at
    once. received: signals that the caller collects (default: collected here).
    Returns 0, or the code of the rank that failed first, as a shell counts it (128 + signal).
    """
    with collect_signals() if received is None else nullcontext(received) as received:
        started = start_ranks(command, ranks, logs, os.environ if environment is None else environment)
        running = list(started)
        try:
            failed, forwarded = _wait(running, received, grace)
        finally:  # after an error here, too, nothing stays behind
            kill_and_wait(running)
    if not failed:
        return 0
    stopped_together = forwarded and len({rank.process.returncode for rank in started}) == 1
    for position, rank in enumerate(failed if not stopped_together else ()):
        lines = [f"{describe_end(rank)}; {f'see {rank.log}' if rank.log else 'its output is above'}"]
        if rank.log is not None and position < SHOWN_TAILS:
            lines += [f"  [rank {rank.rank}] {line}" for line in log_tail(rank.log, rank.log_start)]
        log.error("\n".join(lines))
    code = int(failed[0].process.returncode)
    return 128 - code if code < 0 else code


def _wait(running: list[Rank], received: Sequence[int], grace: float) -> tuple[list[Rank], bool]:
    """Until all ranks have ended: (those that failed by themselves, first one first; whether a signal was forwarded).
    Takes every rank that has ended out of `running`."""
    failed: list[Rank] = []
    forwarded: set[int] = set()
    sent: set[int] = set()  # by us, to end ranks
    failed_at = time.monotonic()
    while running:
        for number in set(STOP_SIGNALS).intersection(received) - forwarded:
            forwarded.add(number)
            send_signal(running, number)

        for rank in list(running):
            # Whether it has ended, without waiting for it and without freeing its process id.
            if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            send_signal([rank], signal.SIGKILL)  # to what it left running, such as loader workers
            running.remove(rank)
            if rank.process.wait() == 0 or (sent and failed):
                continue
            if not failed:
                failed_at = time.monotonic()
                if running and not forwarded:
                    log.error(f"{describe_end(rank)}; ending the others")
            failed.append(rank)

        waited = time.monotonic() - failed_at if failed else 0.0
        out_of_time = waited > grace * (10 if forwarded else 2) or received.count(signal.SIGINT) > 1
        if out_of_time and signal.SIGKILL not in sent:
            sent.add(signal.SIGKILL)
            send_signal(running, signal.SIGKILL)
        elif waited > grace and not forwarded and not sent:
            sent.add(signal.SIGTERM)
            send_signal(running, signal.SIGTERM)
        if running:
            time.sleep(POLL_SECONDS)
    return failed, bool(forwarded)
