"""Command line and commands: arguments in, calls and exit codes out."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

import pytest

import msc.pretrain
from msc.launch import cli, commands
from msc.launch.processes import launcher
from msc.launch.processes.train_request import TrainRequest
from msc.pretrain.presets import preset
from msc.pretrain.requests import EvaluateConfig, SampleConfig
from msc.pretrain.training_start import TrainingStart

MSC = Path(sys.executable).with_name("msc")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run([MSC, *arguments], capture_output=True, text=True, timeout=120, env=env)


# -- help and usage


WORK = ["convert", "inspect", "train", "checkpoints", "evaluate", "sample", "export", "doctor"]
JOBS = ["submit", "status", "logs", "cancel"]
STUDY = ["plan", "sweep", "fit"]


@pytest.mark.parametrize("command", ["", *WORK, *JOBS, *STUDY])
def test_help_of_every_command(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert f"usage: msc {command}".strip() in output
    assert "--traceback" in output


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert run("--help").returncode == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.5
    program = "import sys, msc.launch.cli as cli; cli.build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "deepspeed", "mlflow", "av", "msc.pretrain.config"} & set(loaded)


def test_version() -> None:
    assert run("--version").stdout.startswith("msc 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--presett", "demo"], "unrecognized arguments: --presett"),
        (
            ["train", "--pre", "demo"],
            "unrecognized arguments",
        ),  # abbreviations stop working when options are added
        (["train", "--processes", "0"], "at least 1"),
        (["train", "--processes", "two"], "invalid"),
        (["convert", "a.mp4"], "--out"),
        (["convert", "a.mp4", "--out", "x", "--size", "64"], "HEIGHTxWIDTH"),
        (["convert", "a.mp4", "--out", "x", "--size", "0x64"], "at least 1"),
        (["convert", "a.mp4", "--out", "x", "--bucket", "8x64"], "FRAMESxHEIGHTxWIDTH"),
        (["convert", "a.mp4", "--out", "x", "--part", "3/3"], "'3/3' is not I/N with I from 0 to N-1"),
        (["convert", "a.mp4", "--out", "x", "--part", "0/2", "--merge"], "not allowed with"),
        (["sample", "run", "--video", "a.mp4", "--clip", "1"], "not allowed with"),
        (["evaluate", "run", "--weights", "best"], "ema"),
        (["sample", "run", "other"], "unrecognized arguments: other"),
        (["nothing"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors_exit_with_code_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_positionals_may_follow_options() -> None:
    args = cli.parse(["train", "a.b=1", "--preset", "demo", "c.yaml", "--resume", "d.e=-2"])
    assert args.items == ["a.b=1", "c.yaml", "d.e=-2"]
    args = cli.parse(["convert", "a.mp4", "--out", "x", "b.mp4", "c"])
    assert args.sources == ["a.mp4", "b.mp4", "c"]
    assert cli.parse(["convert", "a", "--out", "x", "--size", "64x96"]).size == (64, 96)
    buckets = cli.parse(["convert", "a", "--out", "x", "--bucket", "8x64x96", "--bucket", "1x64x64"]).bucket
    assert buckets == [(8, 64, 96), (1, 64, 64)]


def test_command_line_of_a_train_request_is_parsed_to_the_same() -> None:
    everything = TrainRequest(
        Path("r"), Path("c.yaml"), ("a.b=1", "d.e=-2"), "demo", True, "5", True, Path("p.json"), 2
    )
    for request in (everything, TrainRequest(Path("r"), resume=True), TrainRequest(Path("r"), preset="demo")):
        assert commands.train_request(cli.parse(request.command_line())) == request


# -- errors


def raising(module: str, error: str) -> Any:
    """A function that raises `error`, as if it stood in `module`."""
    space: dict[str, Any] = {"__name__": module}
    exec(f"def fail(*_):\n    raise {error}", space)
    return space["fail"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError('batch 3 does not divide by 2')", "msc: batch 3 does not divide by 2\n"),
        ("FileNotFoundError('no index.json in x: run `msc convert` first')", "msc: no index.json in x: run"),
        ("FileExistsError(17, 'File exists', 'runs/a')", "msc: runs/a: File exists\n"),
    ],
)
def test_user_error_is_one_line(error: str, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "doctor", raising("msc.pretrain.somewhere", error))
    assert cli.main(["doctor"]) == 2
    got = capsys.readouterr()
    assert got.err.startswith(message)
    assert got.err.count("\n") == 1
    assert got.out == ""
    for arguments in (["doctor", "--traceback"], ["--traceback", "doctor"]):
        assert cli.main(arguments) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_os_error_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "doctor", lambda args: Path("/no/such/file").read_text() and 0)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "msc: /no/such/file: No such file or directory\n"


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("numpy.linalg", "ValueError('shapes')"),
        ("msc.pretrain.model.transformer", "KeyError('x')"),
        ("msc.x", "AssertionError()"),
    ],
)
def test_a_bug_shows_its_traceback(module: str, error: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "doctor", raising(module, error))
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().err
    assert "Traceback (most recent call last)" in output
    assert error.partition("(")[0] in output


def test_failed_rank_does_not_wait_for_exit_handlers(tmp_path: Path) -> None:
    program = """
import atexit, os, time
from msc.launch import cli, commands
def fail(args):
    raise KeyError("what went wrong")
commands.doctor = fail
atexit.register(time.sleep, 300)
cli.main(["doctor"])
"""
    began = time.monotonic()
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "what went wrong" in done.stderr
    assert time.monotonic() - began < 30


def test_ctrl_c_and_closed_pipe_show_no_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "doctor", raising("torch", "KeyboardInterrupt()"))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "msc: interrupted\n"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{MSC}' doctor --json | true"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_user_error_of_a_real_process(tmp_path: Path) -> None:
    done = run("train", "--preset", "nosuch", "--run", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("msc: unknown preset 'nosuch'")
    assert "Traceback" in run("train", "--preset", "nosuch", "--traceback").stderr
    assert not (tmp_path / "run").exists()


# -- msc train


@dataclass
class Calls:
    """What `msc train` did to the modules under it."""

    load: list[tuple] = field(default_factory=list)
    check: list[tuple] = field(default_factory=list)
    train: list[TrainingStart] = field(default_factory=list)
    launcher: list[tuple] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def calls(monkeypatch, tmp_path: Path) -> Calls:
    """`msc train` over stand-ins, in an empty folder, in an environment that no launcher has touched."""
    calls = Calls()
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if (
            name in (*launcher.rank_environment({}, 0, 1, 1), "CUDA_VISIBLE_DEVICES", launcher.LAUNCHED)
            and name != "PATH"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # train sets variables of its process

    def stand_in(name: str, **functions: Any) -> None:
        module = ModuleType(f"msc.pretrain.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(msc.pretrain, name, module, raising=False)

    def train(start: TrainingStart) -> int:
        calls.train.append(start)
        calls.environment.update(os.environ)
        return 5

    stand_in("config", load=lambda *arguments: calls.load.append(arguments) or "config")
    stand_in(
        "validation",
        describe=lambda config, processes: f"plan of {config} on {processes}",
        validate=lambda *arguments: calls.check.append(arguments) or "checked",
    )
    stand_in("train", train=train)
    monkeypatch.setattr(launcher, "run", lambda *arguments: calls.launcher.append(arguments) or 7)
    monkeypatch.setattr(launcher, "visible_gpus", lambda environment: 0)
    monkeypatch.setattr(os, "_exit", lambda code: None)  # how a rank among others ends
    return calls


def test_train_in_this_process(calls: Calls) -> None:
    assert cli.main(["train", "c.yaml", "--preset", "demo", "a.b=1"]) == 5
    assert calls.load == [(preset("demo"), Path("c.yaml"), ["a.b=1"])]
    assert calls.check == [("config", Path("runs/c"), False, 1)]
    assert calls.train == [TrainingStart("checked", Path("runs/c"), False)]
    assert calls.environment["RANK"] == calls.environment["LOCAL_RANK"] == "0"
    assert calls.environment["WORLD_SIZE"] == "1"
    assert int(calls.environment["MASTER_PORT"]) > 0
    assert not calls.launcher


def test_train_starts_ranks_with_the_same_arguments(calls: Calls) -> None:
    arguments = ["train", "--preset", "demo", "--run", "x", "--processes", "2", "a.b=1"]
    assert cli.main(arguments) == 7
    assert calls.check == [("config", Path("x"), False, 2)]
    [(command, ranks, logs)] = calls.launcher
    assert command == [sys.executable, "-c", launcher.PROGRAM, *arguments]
    assert (ranks, logs) == (2, Path("x/logs"))
    assert not calls.train


def test_every_visible_gpu_gets_a_rank(calls: Calls, monkeypatch) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda environment: 4)
    assert cli.main(["train", "--preset", "demo"]) == 7
    assert calls.launcher[0][1:] == (4, Path("runs/demo/logs"))


def test_a_rank_trains_and_starts_nothing(calls: Calls) -> None:
    os.environ.update(launcher.rank_environment({}, 1, 2, 4321), **{launcher.LAUNCHED: "1"})
    assert cli.main(["train", "--preset", "demo", "--processes", "2"]) == 5
    assert calls.train == [TrainingStart("config", Path("runs/demo"), False)]
    assert not calls.check, "the launcher has checked before it calls the run folder"
    assert not calls.launcher
    assert calls.environment["MASTER_PORT"] == "4321"


def test_a_rank_of_another_launcher_checks_for_itself(calls: Calls) -> None:
    os.environ.update(launcher.rank_environment({}, 1, 8, 4321))
    assert cli.main(["train", "--preset", "demo"]) == 5
    assert calls.check == [("config", Path("runs/demo"), False, 8)]
    assert calls.train == [TrainingStart("checked", Path("runs/demo"), False)]


def test_incomplete_rank_environment_is_refused(calls: Calls, capsys) -> None:
    os.environ["RANK"] = "0"
    assert cli.main(["train", "--preset", "demo"]) == 2
    output = capsys.readouterr().err
    assert "WORLD_SIZE" in output
    assert "MASTER_ADDR" in output
    assert not calls.train


def test_dry_run_prints_the_plan_and_starts_nothing(calls: Calls, capsys) -> None:
    assert cli.main(["train", "--preset", "demo", "--dry-run", "--processes", "4"]) == 0
    assert capsys.readouterr().out == "plan of config on 4\n"
    assert not (calls.check or calls.train or calls.launcher)


def test_resume_reads_the_configuration_of_the_run(calls: Calls, capsys) -> None:
    assert cli.main(["train", "--resume", "--run", "x"]) == 2
    assert "x/config.yaml" in capsys.readouterr().err
    Path("x").mkdir()
    Path("x/config.yaml").touch()
    assert cli.main(["train", "--resume", "--run", "x", "a.b=1"]) == 5
    assert calls.load == [(None, Path("x/config.yaml"), ["a.b=1"])]
    assert calls.train == [TrainingStart("checked", Path("x"), True)]


def test_a_rollback_is_a_resume(calls: Calls, capsys) -> None:
    Path("x/checkpoints/step-00000005").mkdir(parents=True)
    Path("x/config.yaml").touch()
    assert cli.main(["train", "--run", "x", "--rollback", "6"]) == 2
    assert "6 is not a checkpoint of x; it has those of steps: 5" in capsys.readouterr().err
    for checkpoint in ("5", "x/checkpoints/step-00000005"):
        assert cli.main(["train", "--run", "x", "--rollback", checkpoint]) == 5
    Path("x/left_out.json").write_text('{"clips": [[8, 12]], "back_to": "step-00000006"}')
    os.environ.pop("RANK")  # what the calls before left in this process
    assert cli.main(["train", "--run", "x", "--rollback", "6"]) == 5  # gone back to before it was pruned
    os.environ.pop("RANK")
    assert cli.main(["train", "--run", "x", "--rollback", "6", "--again"]) == 2
    assert cli.main(["train", "--run", "x", "--rollback", "5", "--again"]) == 5
    assert cli.main(["train", "--run", "x", "--resume", "--again"]) == 2
    assert "--rollback N" in capsys.readouterr().err
    assert [arguments[2] for arguments in calls.check] == [True] * 4
    expected = [("5", False), ("x/checkpoints/step-00000005", False), ("6", False), ("5", True)]
    assert [(start.rollback, start.again) for start in calls.train] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--preset"),
        (["train", "--resume"], "--run"),
        (["train", "a.yaml", "b.yaml"], "a.yaml and b.yaml"),
    ],
)
def test_train_without_configuration(arguments: list[str], message: str, calls: Calls, capsys) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not calls.load


# -- the commands that work on a run


@pytest.mark.parametrize(
    ("arguments", "module", "function", "expected"),
    [
        ("evaluate x", "evaluation.evaluate", "evaluate", ((Path("x"), EvaluateConfig()), {})),
        (
            "evaluate x --clips 3 --weights raw",
            "evaluation.evaluate",
            "evaluate",
            ((Path("x"), EvaluateConfig(clips=3, weights="raw")), {}),
        ),
        (
            "evaluate x --steps 8 --samples 2 --checkpoint 400 --against y --features f.pt2",
            "evaluation.evaluate",
            "evaluate",
            (
                (
                    Path("x"),
                    EvaluateConfig(steps=8, samples=2, checkpoint="400", against=Path("y"), features=Path("f.pt2")),
                ),
                {},
            ),
        ),
        ("sample x", "inference.sample", "sample", ((Path("x"), SampleConfig()), {})),
        (
            f"sample x --video {__file__} --units 8 --seed 0 --out o",
            "inference.sample",
            "sample",
            ((Path("x"), SampleConfig(video=Path(__file__), units=8, seed=0, out=Path("o"))), {}),
        ),
        (
            "sample x --prompt a --prompt b --text t --guidance 3 --solver heun --batch 2 --reach 9 --context-level .1",
            "inference.sample",
            "sample",
            (
                (
                    Path("x"),
                    SampleConfig(
                        prompt=("a", "b"),
                        text=Path("t"),
                        guidance=3.0,
                        solver="heun",
                        batch=2,
                        reach=9,
                        context_level=0.1,
                    ),
                ),
                {},
            ),
        ),
        (
            "sample x --clip 3 --label cat --count 5",
            "inference.sample",
            "sample",
            ((Path("x"), SampleConfig(clip=3, label=("cat",), count=5)), {}),
        ),
        (
            "sample x --nothing --steps 4 --weights ema",
            "inference.sample",
            "sample",
            ((Path("x"), SampleConfig(nothing=True, steps=4)), {}),
        ),
        ("export x", "export.export", "export", ((), {"run": Path("x")})),
        (
            "export x --out y --weights both --dtype bf16 --max-shard-size 1.5GB --checkpoint 40 --push-to-hub me/it",
            "export.export",
            "export",
            (
                (),
                {"run": Path("x"), "out": Path("y"), "weights": "both", "dtype": "bf16",
                 "max_shard_size": 1_500_000_000, "step": "40", "push_to": "me/it"},
            ),
        ),
    ],
)  # fmt: skip
def test_commands_on_a_run(arguments: str, module: str, function: str, expected, monkeypatch, capsys) -> None:
    real = importlib.import_module(f"msc.pretrain.{module}")
    stand_in = create_autospec(getattr(real, function), return_value="what happened")
    monkeypatch.setattr(real, function, stand_in)
    assert cli.main(arguments.split()) == 0
    assert stand_in.call_args == expected
    assert capsys.readouterr().out == "what happened\n"


@pytest.mark.parametrize("size", ["0GB", "5", "GB", "-1GB", "5GiB"])
def test_invalid_file_size(size: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "x", f"--max-shard-size={size}"])
    assert "is not a size such as 5GB" in capsys.readouterr().err


def test_nothing_excludes_context(capsys) -> None:
    assert cli.main(["sample", "x", "--nothing", "--context", "2"]) == 2
    assert "--context is 2" in capsys.readouterr().err
