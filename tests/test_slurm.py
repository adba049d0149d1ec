# ruff: noqa: F811 - `shards` is a fixture
"""Jobs without Slurm: rank environment, cluster configuration, requeue decisions, status; and submissions end to end
with fake sbatch and srun. test_cluster.py has the tests with a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import claim_run_folder
import pytest
import yaml
from gloo_ranks import run_ranks
from test_training import MSC, SMALL, shards, wait_for  # noqa: F401

from msc.datasets.files import last_jsonl_record, write_atomically
from msc.launch import cli, commands
from msc.launch.processes import slurm_env
from msc.launch.slurm import cluster_config, job_records, sbatch, submit, supervisor
from msc.launch.slurm import jobs as status
from msc.launch.slurm.cluster_config import JobRequest
from msc.launch.slurm.job_records import JobRecord
from msc.launch.slurm.sbatch import JobState
from msc.launch.slurm.supervisor import Job, decide
from msc.parallel.console import configure_logging
from msc.parallel.progress import Progress
from msc.pretrain.checkpoints import directory as checkpoint_directory
from msc.pretrain.tracking import heartbeat

configure_logging()
LOCAL = JobRequest("local")

# Ranks -------------------------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "40123", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_CPUS_PER_TASK": "12", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[07-09,12],login", ["gpu07", "gpu08", "gpu09", "gpu12", "login"]),
        ("r[1-2]n[1,5]", ["r1n1", "r1n5", "r2n1", "r2n5"]),
        ("a-b[099-101].x.org,c", ["a-b099.x.org", "a-b100.x.org", "a-b101.x.org", "c"]),
    ],
)
def test_slurm_node_lists(text, names):
    assert slurm_env.hosts(text) == names


def test_rank_environment_of_a_slurm_step():
    got = slurm_env.rank_environment(STEP, "ib0")
    assert got == {
        "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(10_000 + 40123 % 20_000), "OMP_NUM_THREADS": "12", "NCCL_SOCKET_IFNAME": "=ib0",
        "GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    mine = {"NCCL_SOCKET_IFNAME": "bond", "GLOO_SOCKET_IFNAME": "bond", "OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO"}
    assert not set(mine) & set(slurm_env.rank_environment(STEP | mine, "ib0")), "what the user has set stays"
    assert slurm_env.rank_environment(STEP | {"CUDA_VISIBLE_DEVICES": "2"})["LOCAL_RANK"] == "0", "bound by Slurm"
    uneven = STEP | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}
    assert slurm_env.rank_environment(uneven)["LOCAL_WORLD_SIZE"] == "3"
    assert slurm_env.tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_tasks_are_ranks_only_without_another_launcher():
    assert slurm_env.is_task(STEP)
    assert not slurm_env.is_task(STEP | {"RANK": "0"})
    assert not slurm_env.is_task(STEP | {"SLURM_STEP_NUM_TASKS": "1"}), "srun --pty bash"
    assert not slurm_env.is_task({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}), "a batch script"


def test_processes_must_match_srun(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, **STEP})
    assert cli.main(["train", "--preset", "demo", "--processes", "2"]) == 2
    assert "--processes is 2, but srun started 8 tasks" in capsys.readouterr().err


def test_network_interface_towards_other_nodes():
    assert slurm_env.choose_interface(STEP | {"SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n1"}) is None
    devices = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.4", "fe80::1%eth0"], "ib0": ["10.1.0.4"]}
    assert slurm_env.interface_of("10.1.0.4", devices) == "ib0"
    assert slurm_env.interface_of("fe80::1", devices) == "eth0"
    assert slurm_env.interface_of("10.9.9.9", devices) is None
    assert slurm_env.choose_interface(STEP | {"SLURM_STEP_NODELIST": "localhost,elsewhere"}) == "lo"
    assert slurm_env.choose_interface(STEP | {"SLURM_STEP_NODELIST": "no-such-host.invalid,n2"}) is None


def test_log_line_shows_no_secrets_of_the_environment():
    line = slurm_env.describe_rank({**STEP, **slurm_env.rank_environment(STEP), "HF_TOKEN": "geheim"})
    assert line.startswith("rank 6 of 8; MASTER_ADDR=gpu07, MASTER_PORT=10123, NCCL_DEBUG=WARN")
    assert "geheim" not in line


# Settings of a site ------------------------------------------------------------------------------------------


def test_read_cluster_config(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("partition: gpu\nsetup: [module load cuda]\nsbatch: {exclusive: true, nice: 5}\n")
    got = cluster_config.read_cluster_config(file)
    assert (got.partition, got.setup, got.sbatch) == ("gpu", ("module load cuda",), {"exclusive": True, "nice": 5})
    assert cluster_config.read_cluster_config(None) == cluster_config.ClusterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton: gpu", "unknown key partiton; did you mean partition?"),
        ("[a]", "must be a table of keys"),
        ("time: tomorrow", "time is 'tomorrow'"),
        ("starts: 0", "starts is 0"),
        ("time: 24:00:00", "time is 86400; it must be text"),  # to YAML that is 86400
        ("cpus_per_task: many", "cpus_per_task"),
        ("partition: \"a\\n#SBATCH --uid=0\"", "partition is 'a\\n#SBATCH --uid=0'"),
        ("sbatch: {--exclusive: true}", "write it without the leading --"),
        ("sbatch: {signal: USR2}", "set by msc submit itself"),
        ("sbatch: {comment: \"a\\nb\"}", "sbatch.comment"),
        ("environment: {A B: c}", "environment.A B is not a name"),
        ("setup: module load cuda", "setup"),
        ("a: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_invalid_cluster_config(text, message, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        cluster_config.read_cluster_config(tmp_path / "site.yaml")
    assert message in str(error.value)
    assert str(tmp_path / "site.yaml") in str(error.value)


def test_cluster_config_error_shows_no_secret(tmp_path):
    (tmp_path / "site.yaml").write_text("environment: {TOKEN: [geheim]}")
    with pytest.raises(ValueError, match=r"environment\.TOKEN") as error:
        cluster_config.read_cluster_config(tmp_path / "site.yaml")
    assert "geheim" not in str(error.value)


def test_cluster_config_file_search_order(tmp_path):
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert cluster_config.find_config_file(None, environment) is None
    (tmp_path / "msc").mkdir()
    (tmp_path / "msc/site.yaml").touch()
    assert cluster_config.find_config_file(None, environment) == tmp_path / "msc/site.yaml"
    assert cluster_config.find_config_file(None, environment | {"MSC_SITE": "x"}) == Path("x")
    assert cluster_config.find_config_file(Path("y"), environment | {"MSC_SITE": "x"}) == Path("y")


# Restarts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "without_progress", "stepped", "verdict"),
    [
        (0, 3, True, "done"),
        (75, 0, True, "again"),  # stopped and saved
        (75, 2, False, "again"),  # stopped before its first step, by a preemption: twice is bad luck
        (75, 3, True, "over"),
        (1, 0, True, "again"),  # a rank was lost, or a hang ended
        (1, 1, False, "over"),  # a bug, or no way to start: at once and for all
        (137, 1, False, "again"),  # killed from outside
        (137, 3, True, "over"),
        (2, 0, False, "over"),  # the settings
        (2, 1, True, "again"),  # they were good before: a file system that stumbles
        (130, 0, True, "over"),
        (65, 1, True, "over"),  # steps or clips that another start would meet again
        (65, 0, True, "again"),  # once, as the machine may have been at fault
    ],
)
def test_requeue_decision(code, without_progress, stepped, verdict):
    assert decide(code, without_progress, 3, stepped)[0] == verdict


@pytest.mark.parametrize("command", ["train", "convert", "evaluate", "sample", "export"])
def test_commands_that_cannot_resume_are_not_requeued_at_the_time_limit(command, local_job, capsys):
    code, left = local_job((138, 0), (0, 0), arguments=(command, "x"))
    goes_on = command in ("train", "convert")
    assert (code, len(left)) == ((0, 0) if goes_on else (138, 1))
    assert ("raise --time" in capsys.readouterr().err) != goes_on
    assert decide(143, 1, 3, False, goes_on)[0] == "again", "preempted: that says nothing of its time"


def test_starts_without_progress_are_counted_from_the_last():
    assert job_records.starts_without_progress([], 0) == 0
    assert job_records.starts_without_progress([0, 0, 40], 40) == 1
    assert job_records.starts_without_progress([0, 40, 40, 40], 40) == 3
    assert job_records.starts_without_progress([0, 40, 40], 80) == 0


@pytest.fixture
def local_job(tmp_path, monkeypatch):
    """A job whose ranks end as told; `clock` is what its newest checkpoint says."""

    def run(*starts: tuple[int, int], before: int = 0, arguments=("train",)) -> tuple[int, list]:
        clock, left = [before], list(starts)

        def ranks(job, received):
            code, clock[0] = left.pop(0)
            return code

        monkeypatch.setattr(supervisor, "run_ranks", ranks)
        monkeypatch.setattr(supervisor, "progress_of", lambda job: clock[0])
        monkeypatch.setattr(supervisor, "took_a_step", lambda job, number: False)
        monkeypatch.setattr(supervisor, "end_own_mlflow_run", lambda job, code: None)
        job = Job(arguments, str(tmp_path / "run"), str(tmp_path / "run/jobs"), LOCAL)
        code = supervisor.run_attempts(job, [])
        return code, left

    return run


def test_job_restarts_while_it_makes_progress(local_job, capsys):
    assert local_job((1, 40), (137, 80), (1, 120), (0, 160)) == (0, [])
    assert local_job((137, 40), (137, 40), (137, 40), (137, 40), (0, 80)) == (137, [(0, 80)])
    assert "after 3 starts without a new checkpoint" in capsys.readouterr().err
    assert local_job((1, 0), (0, 40))[0] == 1, "failed before its first step"
    assert local_job((1, 40), (0, 80), before=40)[0] == 0, "a run that has worked may fail to start, on a bad node"
    assert local_job((75, 40), (0, 80))[0] == 75, "stopped here by somebody: no scheduler to give way to"


def test_restarts_by_slurm_without_progress_are_given_up(tmp_path, local_job, capsys):
    for _ in range(3):
        job_records.append_event(tmp_path / "run/jobs", str(os.getpid()), **{"from": 40})
    assert local_job((0, 80), before=40) == (1, [(0, 80)])
    assert "given up" in capsys.readouterr().err
    assert local_job((0, 80), before=60)[0] == 0


def test_progress_of_a_conversion_part_counts_its_own_groups(tmp_path):
    work = tmp_path / ".shards.partial/.work"
    work.mkdir(parents=True)
    for number in (0, 1, 3, 4, 6):
        (work / f"group-{number:06d}.json").touch()
    of = Job(("convert",), str(tmp_path / "shards"), "x")
    assert [supervisor.progress_of(replace(of, part=part)) for part in (None, (0, 3), (1, 3), (2, 3))] == [5, 3, 2, 0]


def test_progress_of_a_conversion_to_a_symbolic_link(tmp_path):
    """They lie beside what it points to."""
    (tmp_path / "disk/.shards.partial/.work").mkdir(parents=True)
    (tmp_path / "disk/.shards.partial/.work/group-000000.json").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk/shards")
    assert supervisor.progress_of(Job(("convert",), str(tmp_path / "out"), "x")) == 1


def test_job_refuses_a_run_that_is_being_trained(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(supervisor, "run_ranks", lambda job, received: pytest.fail("started"))
    job = Job(("train",), str(run), str(run / "jobs"), LOCAL)
    with heartbeat.write_heartbeat(run, 2, Progress(), interval=0.05):
        wait_for(lambda: heartbeat.read(run), seconds=10)
        assert supervisor.run_attempts(job, []) == supervisor.USER_ERROR
    assert f"{run} is being trained: process {os.getpid()} on " in capsys.readouterr().err


@pytest.mark.parametrize(("job", "training", "settled"), [("7", False, 1), ("8", True, 0), ("8", False, 1)])
def test_job_ends_only_its_own_mlflow_run(job, training, settled, tmp_path, monkeypatch):
    """Ranks that were killed leave a heartbeat of their job; those that saw their run taken that of another."""
    ended = []
    monkeypatch.setattr("msc.pretrain.tracking.tracker.end_mlflow_run", lambda run, state: ended.append(state))
    monkeypatch.setenv(heartbeat.JOB_VARIABLE, "7")
    with other_process(tmp_path, monkeypatch, job=job, writes=training):
        supervisor.end_own_mlflow_run(Job(("train",), str(tmp_path), "x", LOCAL), 137)
    assert ended == ["FAILED"] * settled


@pytest.mark.gloo
def test_of_two_simultaneous_starts_one_acquires_the_run(tmp_path):
    first, second = sorted(run_ranks(claim_run_folder.each_for_itself, 2, tmp_path / "run"))
    assert first == "" and f"{tmp_path / 'run'} is being trained: process " in second


@pytest.mark.gloo
def test_all_ranks_end_if_the_run_is_taken(tmp_path):
    """As when somebody began while they were still loading and meeting; the heartbeat stays the other's."""
    with heartbeat.write_heartbeat(tmp_path, 1, Progress()):
        wait_for(lambda: heartbeat.read(tmp_path), seconds=10)
        errors = run_ranks(claim_run_folder.as_one_run, 2, tmp_path)
        assert errors[0] == errors[1] and f"is being trained: process {os.getpid()} on " in errors[0]
        assert heartbeat.read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("last", [
    {"phase": "ended"}, {"host": socket.gethostname(), "pid": 2**22 + 1},
    {"ahead": 0}, {"ahead": -7200}, {"ahead": 600},
])  # fmt: skip
def test_run_that_ended_or_was_killed_may_resume(last, tmp_path, monkeypatch):
    """Ended by itself; killed on this machine; and on another, whatever its clock, where only waiting tells: once."""
    with other_process(tmp_path, monkeypatch, writes=False, **last):
        began = time.monotonic()
        heartbeat.check_not_training(tmp_path, interval=0.05)
        assert (time.monotonic() - began >= heartbeat.TAKEOVER_S) == ("ahead" in last)
        began = time.monotonic()
        heartbeat.check_not_training(tmp_path, interval=0.05)
        assert time.monotonic() - began < heartbeat.TAKEOVER_S


@pytest.mark.parametrize("ahead", [-120, 0, 120, 600])
def test_run_is_owned_whatever_the_clock_of_its_node(ahead, tmp_path, monkeypatch):
    with other_process(tmp_path, monkeypatch, ahead=ahead), pytest.raises(ValueError, match="process 1 on elsewhere"):
        heartbeat.acquire_run(tmp_path, 1)


@pytest.mark.parametrize(("writes", "state"), [(True, "RUNNING"), (False, "LOST (silent for ")])
def test_status_of_a_run_on_a_node_whose_clock_is_behind(writes, state, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("train: {clips: 8, batch: 4}")
    with other_process(tmp_path, monkeypatch, ahead=-120, writes=writes):
        (last,) = heartbeat.read_with_own_clock([tmp_path], interval=0.3)
        assert state in status.describe_state(status.read_status(tmp_path, last), [], False, time.time())


@contextlib.contextmanager
def other_process(run, monkeypatch, writes=True, ahead=0, **changes):
    """The heartbeat of a process on a machine whose clock is `ahead` seconds ahead; it goes on if it `writes`."""
    monkeypatch.setattr(heartbeat, "TAKEOVER_S", 1.0)
    monkeypatch.setenv(heartbeat.SILENT_VARIABLE, "")  # restored afterwards
    own = {
        "phase": "report",
        "since": time.time() + ahead,
        "host": "elsewhere",
        "pid": 1,
        "job": "",
        "step": 3,
    } | changes

    def write() -> None:
        content = json.dumps({"time": time.time() + ahead, **own}).encode()
        write_atomically(run / "heartbeat.json", content, sync=False)

    over = threading.Event()

    def loop() -> None:
        while writes and not over.wait(0.1):
            write()

    write()
    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_job_id_of_an_array_part():
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    assert supervisor.slurm_job_id({"SLURM_JOB_ID": "17", **array}) == "17_3"
    assert supervisor.slurm_job_id({"SLURM_JOB_ID": "17"}) == "17"


def test_warning_of_changed_code(capsys):
    supervisor.warn_of_changed_code(Job(("train",), "x", "x", code=(("mlflow.source.git.commit", "0" * 40),)))
    assert "the code is not what was submitted: mlflow.source.git.commit 000" in capsys.readouterr().err


# The command line --------------------------------------------------------------------------------------------


def test_job_options_and_command_arguments_may_mix():
    args = cli.parse(["submit", "c.yaml", "--nodes", "2", "a.b=1", "--preset", "demo", "--time", "1:00:00", "c.d=2"])
    assert (args.nodes, args.time, args.cluster) == (2, "1:00:00", "slurm")
    assert (args.inner.command, args.inner.items, args.inner.preset) == ("train", ["c.yaml", "a.b=1", "c.d=2"], "demo")
    args = cli.parse(["submit", "--parts", "4", "convert", "v w", "--out", "s", "--partition", "p", "--frames", "8"])
    assert args.inner.argv == ["convert", "v w", "--out", "s", "--frames", "8"]
    job_request = JobRequest(**commands.options_for(JobRequest, args))
    assert job_request.options() == ["--partition", "p", "--parts", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "x.yaml", "--processes", "2"], "--processes 2"),
        (["submit", "x.yaml", "--cluster", "local", "--nodes", "2"], "this machine alone"),
        (["submit", "x.yaml", "--parts", "2"], "--parts divides a conversion"),
        (["submit", "x.yaml", "--rollback", "4", "--again"], "--again would go back at every start"),
        (["submit", "evaluate", "nowhere"], "is not a run folder"),
        (["submit", "evaluate", "nowhere", "--nodes", "2"], "is one process, but 2 tasks"),
        (["submit", "convert", "v", "--out", "s", "--parts", "2", "--cluster", "local"], "--parts needs Slurm"),
        (["submit", "x.yaml", "--time", "soon"], "time is 'soon'"),
        (["submit", "x.yaml", "--partition", "a\nb"], "partition is 'a\\nb'"),
        (["status"], "no run in runs/"),
        (["status", "nowhere"], "nowhere is not a run folder"),
        (["logs", "nowhere"], "nowhere has no job"),
        (["cancel", "nowhere"], "no job of nowhere"),
    ],
)
def test_invalid_submissions_write_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written before all is checked"


def test_evaluation_array_passes_every_option(tmp_path, monkeypatch, capsys):
    """An array's jobs are given everything that a single `msc evaluate` takes."""
    values, options = {"N": "3", "N|PATH": "7", "RUN": "other run", "FILE": "net.pt2", None: "raw"}, []
    for action in cli.build_parser()[1]["evaluate"]._actions:
        if action.option_strings and action.dest not in ("help", "traceback"):  # those are of `msc submit` itself
            options += [action.option_strings[-1], values[action.metavar]]
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").touch()
    sent = []
    monkeypatch.setattr(sbatch, "submit_array", lambda function, jobs, *_: sent.extend(jobs) or "7")
    assert cli.main(["submit", "evaluate", *map(str, runs), *options]) == 0, capsys.readouterr().err
    for run, job in zip(runs, sent, strict=True):
        alone = ["evaluate", str(run), *options]
        assert vars(cli.parse(job.arguments)) | {"argv": alone} == vars(cli.parse(alone))


def test_plan_file_is_passed_to_the_job(shards, tmp_path, monkeypatch, capsys):
    """To the ranks and into the command that goes on, named so that it is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    sent = []
    monkeypatch.setattr(sbatch, "submit_array", lambda function, jobs, *_: sent.extend(jobs) or "7")
    arguments = ["submit", "--preset", "demo", f"data.shards={shards}", *SMALL, "--run", "run", "--plan", "plan.json"]
    assert cli.main(arguments) == 2 and "plan.json: No such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "plan.json").write_text(json.dumps({"step_s": 1.0, "memory_gib": 2.0}))
    assert cli.main(arguments) == 0
    again = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("go on"))
    assert cli.parse(sent[0].arguments).plan == cli.parse(shlex.split(again)[3:]).inner.plan == tmp_path / "plan.json"


@pytest.mark.parametrize("name", ["a\nb", "100%", "a\\b"])
def test_folders_that_break_a_batch_script_are_refused(name):
    with pytest.raises(ValueError, match="folder"):
        sbatch.check_folder(Path("/x") / name)


# A submission from end to end, with fake sbatch and srun -------------------------------

SBATCH = """#!/bin/sh
env | sort > '{place}/sbatch.env'
export SLURM_JOB_ID=77 SLURM_NTASKS=2 SLURM_JOB_NODELIST=n1
sh -c '(sleep 0.3; exec bash "$1") >"$2" 2>&1 &' - "$1" '{place}/out'
echo Submitted batch job 77
"""
SRUN = '#!/bin/sh\nprintf "%s\\n" "$@" > \'{place}/srun\'\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\nexec "$@"\n'
SACCT = "#!/bin/sh\nexit 0\n"
# In the place of the ranks' python: writes down what it was given.
PYTHON = """#!{python}
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open({place!r} + "/rank.tmp", "w"))
os.rename({place!r} + "/rank.tmp", {place!r} + "/rank")
print("the rank was here")
"""
MALICIOUS = "a 'b' \"c\" $(touch PWNED) `touch PWNED` ; touch PWNED & | > PWNED #"


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    place = tmp_path / "programs"
    place.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "squeue": SACCT, "python": PYTHON}.items():
        (place / name).write_text(text.format(place=str(place), python=sys.executable))
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    return place


def all_text(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_malicious_names_and_secrets_end_to_end(shards, fake_slurm, tmp_path, monkeypatch, capsys):
    """Names arrive as they are and do nothing; what is secret arrives in the environment and is written nowhere."""
    work = tmp_path / MALICIOUS
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_TOKEN", "geheim-1")
    file = work / "site.yaml"
    chosen = {"environment": {"OTHER_TOKEN": "geheim-2"}, "python": str(fake_slurm / "python"),
              "srun": [f"--x={MALICIOUS}"], "partition": MALICIOUS, "account": MALICIOUS}  # fmt: skip
    file.write_text(yaml.safe_dump(chosen))
    run = work / f"run {MALICIOUS}"
    experiment = MALICIOUS + "\nx"
    arguments = ["--preset", "demo", f"data.shards={shards}", *SMALL, f"metrics.experiment={json.dumps(experiment)}"]
    command = ["submit", *arguments, "--run", str(run), "--site", str(file), "--nodes", "1", "--tasks-per-node", "2"]
    assert cli.main(command) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    wait_for(lambda: job_records.read_events(run / "jobs", "77")[1:], seconds=60)

    argv, environment = json.loads((fake_slurm / "rank").read_text())
    assert argv[2:] == ["train", "--resume", "--run", str(run)]
    assert f"--x={MALICIOUS}" in (fake_slurm / "srun").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["metrics"]["experiment"] == experiment
    again = shlex.split(next(line for line in output.splitlines() if line.startswith("go on")))[2:]
    assert again[:2] == ["msc", "submit"] and again[-2:] == ["--run", str(run)]

    assert (environment["HF_TOKEN"], environment["OTHER_TOKEN"]) == ("geheim-1", "geheim-2")
    assert environment["PYTHONSAFEPATH"] == "1"
    assert b"geheim-2" in (fake_slurm / "sbatch.env").read_bytes()
    assert (
        b"geheim" not in all_text(run) and "geheim" not in output and b"geheim" not in (fake_slurm / "out").read_bytes()
    )
    assert "OTHER_TOKEN" not in os.environ, "only sbatch is told"

    script = (run / "jobs/77_submission.sh").read_text()
    options = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert {f"--partition={MALICIOUS}", f"--account={MALICIOUS}", "--requeue", "--signal=USR1@120"} <= set(options)
    assert not any("wckey" in option for option in options)
    name = next(option for option in options if option.startswith("--job-name="))
    assert name.removeprefix("--job-name=").replace("_", "").isalnum()
    assert not list(tmp_path.rglob("PWNED"))

    (record,) = job_records.read_records(run / "jobs")
    assert (record.id, record.cluster, record.tasks) == ("77", "slurm", 2) and "msc.version" in record.code
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0  # Slurm has forgotten it
    assert "NOT STARTED" in capsys.readouterr().out


def test_refused_submission_leaves_no_run(shards, fake_slurm, tmp_path, monkeypatch, capsys):
    (fake_slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    arguments = ["submit", "--preset", "demo", f"data.shards={shards}", *SMALL, "--run", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "msc: sbatch: error: invalid partition specified: x\n"
    assert not list((tmp_path / "run").iterdir())
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(arguments) == 2
    assert "--cluster local" in capsys.readouterr().err


# Takes the first job and no other.
ONE_ONLY = """#!/bin/sh
[ -e '{place}/accepted' ] && { echo 'sbatch: error: job limit reached' >&2; exit 1; }
touch '{place}/accepted'
echo Submitted batch job 77
"""


@pytest.mark.parametrize("code", [0, 1])
def test_conversion_whose_merge_is_refused_is_cancelled(code, fake_slurm, tmp_path, monkeypatch, capsys):
    """Also where it cannot be: then what its tasks read stays, and so does its record for `msc cancel`."""
    scancel = f"#!/bin/sh\necho $* >> '{fake_slurm}/cancelled'\necho no answer >&2\nexit {code}\n"
    for name, text in {"sbatch": ONE_ONLY.replace("{place}", str(fake_slurm)), "scancel": scancel}.items():
        (fake_slurm / name).write_text(text)
        (fake_slurm / name).chmod(0o755)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    jobs = tmp_path / "shards.jobs"
    assert cli.main(["submit", "convert", "videos", "--out", str(tmp_path / "shards"), "--parts", "3"]) == 2
    output = capsys.readouterr().err
    assert "job limit reached" in output and (fake_slurm / "cancelled").read_text() == "77\n"
    assert ("job 77 was accepted, and is cancelled" in output) == (code == 0)
    assert ("job 77 was accepted and could not be taken back: no answer" in output) == (code == 1)
    assert [record.id for record in job_records.read_records(jobs)] == ["77"] * code
    assert (len(list(jobs.glob("*.pkl"))) >= 3) == (code == 1)


@pytest.mark.parametrize(("parallel", "at_once"), [(0, 257), (5, 5)])
def test_array_parallelism(parallel, at_once, fake_slurm, tmp_path):
    """submitit's own default is 256."""
    (fake_slurm / "sbatch").write_text(f"#!/bin/sh\ncp \"$1\" '{fake_slurm}/script'\necho Submitted batch job 77\n")
    jobs = [Job(("convert",), "x", "x")] * 257
    assert submit.submit_array(jobs, tmp_path / "jobs", "x", parallel=parallel).id == "77"
    assert f"#SBATCH --array=0-256%{at_once}\n" in (fake_slurm / "script").read_text()


# In the background of this machine ---------------------------------------------------------------------------


def test_background_job_status_logs_and_cancel(shards, tmp_path, capfd, request):
    run = tmp_path / "run"
    request.addfinalizer(lambda: cli.main(["cancel", str(run)]))  # it would go on for long if the test ended here
    where = ["--cluster", "local", "--run", str(run)]
    assert cli.main(["submit", *where, "--preset", "demo", f"data.shards={shards}", *SMALL, "train.clips=40000"]) == 0
    output = capfd.readouterr().out
    assert f"msc submit --cluster local --resume --run {run}" in output
    (record,) = job_records.read_records(run / "jobs")
    wait_for(lambda: last_jsonl_record(run / "log.jsonl").get("step", 0) > 3)
    wait_for(lambda: heartbeat.read(run)["phase"] != "starting", seconds=20)
    assert cli.main(["status", str(run)]) == 0
    line = capfd.readouterr().out.splitlines()[1].split()
    assert (line[1], line[-1]) == (record.id, "RUNNING")
    assert cli.main(["submit", *where, "--resume"]) == 2
    assert f"job {record.id} is training in {run}" in capfd.readouterr().err
    assert cli.main(["cancel", str(run)]) == 0
    assert capfd.readouterr().out == f"ended: {record.id}\n"
    assert cli.main(["status", str(run)]) == 0
    assert "STOPPED" in capfd.readouterr().out
    assert cli.main(["logs", str(run), "--lines", "3"]) == 0
    output = capfd.readouterr().out
    assert (
        "stopped at step" in output and f"in the queue again: msc submit --cluster local --resume --run {run}" in output
    )
    assert cli.main(["logs", str(run), "--rank", "1"]) == 2
    assert not submit.active_records([replace(record, created=1.0)]), "another process with its number is not the job"


def test_debug_job_saves_at_ctrl_c(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["submit", "--cluster", "debug", "--run", run, "--preset", "demo", f"data.shards={shards}", *SMALL]
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen([MSC, *map(str, arguments), "train.clips=40000"], stdout=output, stderr=output,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    try:
        wait_for(lambda: last_jsonl_record(run / "log.jsonl").get("step", 0) > 3 or job.poll() is not None, seconds=120)
        job.send_signal(signal.SIGINT)
        code = job.wait(timeout=60)
    finally:
        job.kill()
    text = (tmp_path / "output").read_text()
    assert code == supervisor.REQUEUE and "stopped at step" in text and "go on" in text, text
    assert checkpoint_directory.newest_meta(run).step > 3


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ([], "job 17 of run was started on elsewhere, and no sign of its end is here: use `msc cancel` there"),
        ([{"from": 0}], "was started on elsewhere"),
        ([{"from": 0}, {"code": 1, "verdict": "again"}, {"from": 4}], "was started on elsewhere"),
        ([{"from": 0}, {"code": 0, "verdict": "done"}], "no job of run is in the queue or running"),
    ],
)
def test_cancel_refuses_a_job_of_another_machine(notes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    job_records.write_record(Path("run/jobs"), JobRecord("17", "local", ("train",), "x", host="elsewhere"))
    for note in notes:
        job_records.append_event(Path("run/jobs"), "17", **note)
    assert cli.main(["cancel", "run"]) == 2
    assert message in capsys.readouterr().err


# Status -----------------------------------------------------------------------------------------------------

NOW = 1_000_000.0
HEARTBEAT = {
    "time": NOW - 2,
    "started": NOW - 900,
    "step": 7,
    "phase": "forward and backward",
    "since": NOW - 3,
    "job": "5",
}
OLD, LONG = HEARTBEAT | {"time": NOW - 300}, HEARTBEAT | {"since": NOW - 700}
SENT = JobRecord("5", "slurm", ("train",), "log", host="n1")
LINE = {"step": 7, "clock": 28, "loss": 1.5, "tokens_per_s": 3100.0, "clips_per_s": 2.0}
RUN = status.RunStatus(Path("r"), 400, 4, LINE, HEARTBEAT, (5, 20, NOW - 130), SENT)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "queue", "message"),
    [
        ({}, [JobState("RUNNING")], "RUNNING"),
        ({"heartbeat": LONG}, [JobState("RUNNING")], "RUNNING (forward and backward for 11 min)"),
        ({"heartbeat": OLD}, [JobState("RUNNING")], "LOST (silent for 5 min in step 7, forward and backward)"),
        ({"heartbeat": OLD}, [JobState("PENDING", "BeginTime", "12:00")], "PENDING (BeginTime, starts 12:00)"),
        ({"heartbeat": None, "saved": None}, [JobState("PENDING", "Priority")], "PENDING (Priority)"),
        ({"heartbeat": None, "saved": None}, [JobState("RUNNING")], "STARTING"),
        ({"heartbeat": HEARTBEAT | {"phase": "ended"}}, [JobState("FAILED", exit="1:0")], "FAILED (exit 1:0)"),
        ({"heartbeat": HEARTBEAT | {"phase": "ended"}}, [], "STOPPED"),
        ({"saved": (100, 400, NOW), "heartbeat": HEARTBEAT | {"phase": "ended"}}, [JobState("COMPLETED")], "FINISHED"),
        ({"heartbeat": None, "saved": None, "record": None}, [], "NOT STARTED"),
        ({}, [JobState("RUNNING"), JobState("PENDING"), JobState("PENDING")], "2 PENDING, 1 RUNNING"),
    ],
)  # fmt: skip
def test_describe_state(changes, queue, message):
    assert status.describe_state(replace(RUN, **changes), queue, False, NOW) == message


def test_status_table_row():
    got = status.table_row(RUN, "RUNNING", NOW)
    assert got == ["r", "5", "7/100", "1.5000", "3,100", "3 min", "step 5, 2 min ago", "RUNNING"]
    assert status.table_row(replace(RUN, line=None, saved=None), "STARTING", NOW)[2:7] == ["0/100", "-", "-", "-", "-"]
    assert [status.duration(s) for s in (5, 60, 3660, 200_000)] == ["5 s", "1 min", "1 h 1 min", "2 d 7 h"]


def test_heartbeat_shows_phase_and_end(tmp_path):
    progress = Progress()
    with heartbeat.write_heartbeat(tmp_path / "run", 2, progress, interval=0.05):
        wait_for(lambda: heartbeat.read(tmp_path / "run").get("phase") == "starting", seconds=10)
        progress.at(3, "reading clips")
        wait_for(lambda: heartbeat.read(tmp_path / "run")["phase"] == "reading clips", seconds=10)
        last = heartbeat.read(tmp_path / "run")
        assert (last["step"], last["ranks"]) == (3, 2) and abs(last["since"] - time.time()) < 5
    assert heartbeat.read(tmp_path / "run")["phase"] == heartbeat.ENDED
    with heartbeat.write_heartbeat(None, 2, progress):
        progress.at(1, "nothing")
    assert heartbeat.read(tmp_path) == {}


def test_unreachable_slurm_is_not_an_empty_queue(fake_slurm, tmp_path, capsys):
    (fake_slurm / "squeue").write_text("#!/bin/sh\necho 'cannot reach the controller' >&2\nexit 1\n")
    run = tmp_path / "run"
    job_records.write_record(run / "jobs", JobRecord("5", "slurm", ("train",), "x"))
    (run / "config.yaml").write_text("train: {clips: 4, batch: 1}")
    assert cli.main(["submit", "--resume", "--run", str(run)]) == 1
    assert "squeue fails, so what has become of jobs is not known; try again: cannot reach" in capsys.readouterr().err
    assert cli.main(["status", str(run)]) == 0
    shown = capsys.readouterr()
    assert "NOT STARTED" in shown.out and "squeue fails" in shown.err


def test_job_states_from_squeue_and_sacct(fake_slurm):
    (fake_slurm / "squeue").write_text(
        f"#!/bin/sh\necho $* >> '{fake_slurm}/queries'\n"
        "printf '5|RUNNING|None|2026-01-01T00:00:00\\n6|PENDING|Resources|N/A\\n6|RUNNING|None|N/A\\n'\n"
    )
    (fake_slurm / "sacct").write_text(
        "#!/bin/sh\nprintf '7|CANCELLED by 0|0:15\\n8_0|FAILED|1:0\\n8_1|COMPLETED|0:0\\n'\n"
    )
    got = sbatch.job_states(["5", "6", "7", "8", "9"])
    assert got["5"] == [JobState("RUNNING", "", "2026-01-01T00:00:00")] and got["5"][0].active
    assert [s.name for s in got["6"]] == ["PENDING", "RUNNING"] and got["6"][0].reason == "Resources"
    assert got["7"] == [JobState("CANCELLED", exit="0:15")] and not got["7"][0].active
    assert [s.name for s in got["8"]] == ["FAILED", "COMPLETED"] and "9" not in got
    assert sbatch.job_states(["8_1"]) == {"8_1": [JobState("COMPLETED", exit="0:0")]}
    queries = (fake_slurm / "queries").read_text().splitlines()
    assert len(queries) == 2 and "--jobs=5,6,7,8,9 " in queries[0] and "--jobs=8 " in queries[1]


def test_forgotten_job_is_no_error(fake_slurm):
    (fake_slurm / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    assert sbatch.job_states(["5"]) == {}


def test_cancel_polls_slurm_for_all_jobs_at_once(tmp_path, monkeypatch):
    """For all of a run at once, and seconds apart: one job goes at the second look, the other at the third."""
    queries, slept, here = [], [], time.sleep
    for number in "567":
        job_records.write_record(tmp_path / "run/jobs", JobRecord(number, "slurm", ("evaluate",), "x"))

    def states(numbers):
        queries.append(list(numbers))
        return {number: [JobState("RUNNING" if len(queries) < int(number) - 3 else "CANCELLED")] for number in numbers}

    monkeypatch.setattr(sbatch, "job_states", states)
    monkeypatch.setattr(status.shutil, "which", lambda name: name)
    monkeypatch.setattr(status.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(status.time, "sleep", lambda seconds: slept.append(seconds) if seconds > 1 else here(seconds))
    assert status.cancel(tmp_path / "run") == "ended: 5, 6, 7"
    assert queries == [["5", "6", "7"]] * 4 and slept == [status.POLL_SECONDS] * 2
