"""Process launcher with real processes: environment, logs, exit codes, signals, and no process left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msc.launch.processes import launcher as local
from msc.parallel.signals import collect_signals

PRINT_ENVIRONMENT = """
import json, os, sys
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
path = os.path.join(sys.argv[1], os.environ["RANK"] + ".json")
got = {name: os.environ[name] for name in names} | {"sid": os.getsid(0), "pid": os.getpid()}
json.dump(got, open(path, "w"))
print("hello from rank", os.environ["RANK"])
"""

# Writes "up" when its handlers are set, then one line for each signal, and stops at SIGTERM or SIGINT.
SAVE_AND_STOP = """
import os, signal, sys, time
log = open(os.path.join(sys.argv[1], os.environ["RANK"] + ".signals"), "a", buffering=1)
stop = []
def handle(number, _):
    print(signal.Signals(number).name, file=log)
    if number != signal.SIGUSR1:
        stop.append(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, handle)
print("up", file=log)
deadline = time.monotonic() + 60
while not stop and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.3)  # saving
print("saved", file=log)
sys.exit(int(sys.argv[2]))
"""

# A launcher in a process of its own, to be sent signals: `LAUNCHER folder ranks grace program arguments…`
LAUNCHER = """
import sys
from pathlib import Path
from msc.launch.processes import launcher as local
folder, ranks, grace, *command = sys.argv[1:]
sys.exit(local.run([sys.executable, "-c", *command], int(ranks), Path(folder) / "logs", grace=float(grace)))
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def wait_for(condition, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting for {what}"
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat").read_text() if Path(f"/proc/{pid}/stat").exists() else ") Z"
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def launcher(folder: Path, ranks: int, program: str, *arguments: object, grace: float = 5.0) -> subprocess.Popen[str]:
    """Started with default signal handling, whatever the test runner itself ignores."""
    return subprocess.Popen(
        python(LAUNCHER, folder, ranks, grace, program, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_rank_environment() -> None:
    base = {"PATH": "/bin", "HOME": "/home/x", "RANK": "7"}
    got = local.rank_environment(base, 1, 4, 1234)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [got[name] for name in names] == ["1", "4", "1", "4"]
    assert (got["MASTER_ADDR"], got["MASTER_PORT"], got["PYTHONSAFEPATH"]) == ("127.0.0.1", "1234", "1")
    assert got["HOME"] == "/home/x"
    assert got["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/bin"]
    assert local.rank_environment(got, 0, 4, 1)["PATH"] == got["PATH"], "not put first again and again"
    assert base["RANK"] == "7", "the given environment is not changed"


def test_cores_are_divided_unless_set_by_the_user() -> None:
    cores = len(os.sched_getaffinity(0))
    assert local.rank_environment({}, 0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert local.rank_environment({}, 0, 1000, 1)["OMP_NUM_THREADS"] == "1"
    assert local.rank_environment({"OMP_NUM_THREADS": "3"}, 0, 2, 1)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1, 3", 3), ("0,-1,1", 1), ("GPU-ab,GPU-cd", 2)]
)
def test_gpus_from_the_environment(visible: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_gpus_from_the_device_files(tmp_path: Path) -> None:
    assert local.visible_gpus({}, tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert local.visible_gpus({}, tmp_path) == 2


def test_every_rank_has_its_environment_and_session(tmp_path: Path, capfd) -> None:
    assert local.run(python(PRINT_ENVIRONMENT, tmp_path), 3, tmp_path / "logs") == 0
    got = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [g["RANK"] for g in got] == [g["LOCAL_RANK"] for g in got] == ["0", "1", "2"]
    assert all(g["WORLD_SIZE"] == g["LOCAL_WORLD_SIZE"] == "3" for g in got)
    assert len({g["MASTER_PORT"] for g in got}) == 1
    assert all(g["sid"] == g["pid"] for g in got)
    assert capfd.readouterr().out.strip() == "hello from rank 0", "only rank 0 writes on the terminal"
    assert not (tmp_path / "logs" / "rank_0.log").exists()
    assert lines(tmp_path / "logs" / "rank_2.log") == ["hello from rank 2"]


def test_logs_are_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        assert local.run(python(PRINT_ENVIRONMENT, tmp_path), 2, tmp_path / "logs") == 0
    assert lines(tmp_path / "logs" / "rank_1.log") == ["hello from rank 1"] * 2


def test_failed_rank_is_reported_with_code_and_log_tail(tmp_path: Path, caplog) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank_1.log").write_text("from an earlier launch\n")
    program = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("the reason"); sys.exit(7)
time.sleep(60)
"""
    began = time.monotonic()
    assert local.run(python(program), 3, logs, grace=0.3) == 7
    assert time.monotonic() - began < 20
    output = caplog.text
    assert "rank 1 ended with exit code 7" in output
    assert str(logs / "rank_1.log") in output
    assert "[rank 1] the reason" in output
    assert "earlier launch" not in output
    assert "rank 0" not in output, "the ranks that the launcher ended did not fail"
    assert "rank 2" not in output


def test_log_tail_ends_with_the_verdict_and_leaves_out_the_stacks(tmp_path: Path) -> None:
    log = tmp_path / "rank_1.log"
    stacks = [f'  File "x.py", line {i} in f' for i in range(60)]
    log.write_text("\n".join(["msc: rank 1: step 1 is skipped", *stacks, "msc: rank 1: rank 0 is silent"]) + "\n")
    assert local.log_tail(log, 0) == ["msc: rank 1: rank 0 is silent"]
    with log.open("a") as file:
        file.write("Traceback (most recent call last):\n  one\nRuntimeError: two\n")
    assert local.log_tail(log, 0)[1:] == ["Traceback (most recent call last):", "  one", "RuntimeError: two"]


def test_grace_period_for_other_ranks(tmp_path: Path, caplog) -> None:
    program = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(0.5)
if os.environ["RANK"] == "0":
    open(os.path.join(sys.argv[1], "finished"), "w").close()
else:
    sys.exit(9)
"""
    assert local.run(python(program, tmp_path), 3, tmp_path / "logs", grace=20) == 7
    assert (tmp_path / "finished").exists()
    output = caplog.text
    assert output.index("rank 1 ended with exit code 7") < output.index("rank 2 ended with exit code 9")


def test_crashed_rank_gives_a_shell_exit_code(tmp_path: Path, caplog) -> None:
    program = "import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSEGV)"
    assert local.run(python(program), 2, tmp_path / "logs") == 128 + signal.SIGSEGV
    output = caplog.text
    assert "rank 1 was ended by SIGSEGV" in output
    assert "Segmentation fault" in output, "faulthandler says where"


def test_rank_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    program = """
import os, signal, subprocess, sys, time
if os.environ["RANK"] == "1":
    while not os.path.exists(sys.argv[1] + "/pid"):
        time.sleep(0.02)
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
open(sys.argv[1] + "/tmp", "w").write(str(child.pid))
os.rename(sys.argv[1] + "/tmp", sys.argv[1] + "/pid")
time.sleep(300)
"""
    assert local.run(python(program, tmp_path), 2, tmp_path / "logs", grace=0.3) == 3
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(child), "the child of a killed rank to end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_signal_is_forwarded_once_and_ranks_may_save(number: signal.Signals, tmp_path: Path) -> None:
    process = launcher(tmp_path, 2, SAVE_AND_STOP, tmp_path, 0)
    signals = [tmp_path / "0.signals", tmp_path / "1.signals"]
    wait_for(lambda: all(lines(path) == ["up"] for path in signals), "the ranks")
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all("SIGUSR1" in lines(path) for path in signals), "SIGUSR1")
    process.send_signal(number)
    if number == signal.SIGTERM:  # Slurm repeats itself; a second Ctrl-C means something else
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert [lines(path) for path in signals] == [["up", "SIGUSR1", number.name, "saved"]] * 2


def test_ranks_stopped_by_a_signal_are_no_failure(tmp_path: Path) -> None:
    process = launcher(tmp_path, 2, SAVE_AND_STOP, tmp_path, 5)
    wait_for(lambda: all(lines(tmp_path / f"{rank}.signals") == ["up"] for rank in range(2)), "the ranks")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (5, "")


def test_a_second_ctrl_c_ends_ranks_that_hang(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(os.path.join(sys.argv[1], os.environ["RANK"] + ".up"), "w").close()
time.sleep(300)
"""
    process = launcher(tmp_path, 2, program, tmp_path, grace=60)
    wait_for(lambda: all((tmp_path / f"{rank}.up").exists() for rank in range(2)), "the ranks")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    program = """
import os, sys, time
open(os.path.join(sys.argv[1], os.environ["RANK"] + ".pid"), "w").write(str(os.getpid()))
time.sleep(300)
"""
    process = launcher(tmp_path, 2, program, tmp_path)
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in files), "the ranks")
    pids = [int(path.read_text()) for path in files]
    assert all(map(alive, pids))
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(map(alive, pids)), "the ranks to end with their launcher")


def test_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("no-such-program")):
        local.run(["no-such-program"], 2, tmp_path / "logs")


def test_gpu_shares(monkeypatch):
    seen = {"CUDA_VISIBLE_DEVICES": "5, 2,GPU-7a,1,-1,3"}  # CUDA stops reading at -1
    assert local.gpu_shares(seen, 2, 2) == ["5,2", "GPU-7a,1"]
    assert local.gpu_shares(seen, 3, 1) == ["5", "2", "GPU-7a"]
    assert local.gpu_shares({"CUDA_VISIBLE_DEVICES": "-1"}, 3, 2) == ["", "", ""]
    with pytest.raises(ValueError, match="3 runs at a time of 2 processes need 6 GPUs, but 4 are visible"):
        local.gpu_shares(seen, 3, 2)
    monkeypatch.setattr(
        local.Path, "glob", lambda *_: [Path(f"/dev/nvidia{name}") for name in ("0", "1", "2", "3", "ctl")]
    )
    assert local.gpu_shares({}, 2, 2) == ["0,1", "2,3"]


def test_signal_collected_by_the_caller_is_forwarded(tmp_path):
    """Whoever runs ranks for a job must learn of the signal, or it would start them again after a cancellation."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with collect_signals() as received:
        received.append(signal.SIGTERM)
        assert local.run(command, 1, tmp_path, received=received) == 128 + signal.SIGTERM
        assert received == [signal.SIGTERM]
