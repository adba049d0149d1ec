"""Tracking on a real sqlite store and a real server; the meter."""

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from msc.pretrain.tracking.mlflow_store import read_identity, without_credentials
from msc.pretrain.tracking.throughput import Meter, memory, mfu
from msc.pretrain.tracking.tracker import MetricsConfig, Tracker, end_mlflow_run

PARAMS = {"model.width": 64, "train.seed": 0, "model.scales": [{"heads": 2}]}
QUIET = MetricsConfig(system=False)
NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # set by start; monkeypatch puts back what was there before


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> bytes:
    """A migrated sqlite file, so that not every test pays for the migrations."""
    run = tmp_path_factory.mktemp("store") / "run"
    tracker = Tracker(QUIET)
    tracker.start(run, {}, "", "empty")
    tracker.finish("FINISHED", timeout=120)
    database = (run.parent / "mlflow.db").read_bytes()
    assert database
    return database


@pytest.fixture
def run(tmp_path, empty_store) -> Path:
    folder = tmp_path / "my runs" / "first"
    folder.mkdir(parents=True)
    # Only the schema is of use: the artifacts of its experiment would land in the other folder.
    (folder.parent / "mlflow.db").write_bytes(empty_store)
    return folder


def config(run: Path, **changes) -> MetricsConfig:
    return MetricsConfig(experiment="tests", **{"system": False, **changes})


def client_of(run: Path, uri: str | None = None):
    from mlflow import MlflowClient

    return MlflowClient(uri or config(run).resolve(run))


def run_of(run: Path, uri: str | None = None):
    return client_of(run, uri).get_run(read_identity(run)["run_id"])


def history(run: Path, name: str, uri: str | None = None) -> list[tuple[int, float]]:
    points = client_of(run, uri).get_metric_history(read_identity(run)["run_id"], name)
    return sorted((point.step, point.value) for point in points)


def start(run: Path, settings: MetricsConfig | None = None, params=PARAMS, bound=20_000, **changes) -> Tracker:
    tracker = Tracker(settings or config(run), bound=bound)
    began = time.perf_counter()
    tracker.start(run, params, "seed: 0\n", "first", **changes)
    assert time.perf_counter() - began < 0.5
    return tracker


def log_quickly(tracker: Tracker, steps: range, **values: float) -> None:
    """Log every step; no call may keep training waiting."""
    slowest = 0.0
    for step in steps:
        began = time.perf_counter()
        tracker.log({"loss": 1 / (step + 1), **values}, step)
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.001)
    assert slowest < 0.05, f"a log call took {slowest:.3f} s"


def test_a_run_from_start_to_end(run):
    tracker = start(run)
    log_quickly(tracker, range(300), lr=1e-3)
    tracker.tags({"note": "x" * 9000})
    (run / "samples").mkdir()
    (run / "samples" / "a.txt").write_text("a")
    (run / "sheet.png").write_bytes(b"png")
    tracker.artifact(run / "sheet.png", "samples")
    tracker.artifact(run / "samples", "all")
    tracker.artifact(run / "missing.png")
    tracker.finish("FINISHED")
    mlflow_run = run_of(run)
    assert tracker.run_id == mlflow_run.info.run_id
    assert (mlflow_run.info.status, mlflow_run.info.run_name) == ("FINISHED", "first")
    assert mlflow_run.info.end_time
    assert history(run, "loss") == [(step, 1 / (step + 1)) for step in range(300)]
    assert mlflow_run.data.metrics["lr"] == 1e-3
    assert mlflow_run.data.params["model.width"] == "64"
    assert mlflow_run.data.tags["msc.version"]
    checkout = (Path(__file__).resolve().parents[1] / ".git").exists()
    assert ("mlflow.source.git.commit" in mlflow_run.data.tags) == checkout
    assert len(mlflow_run.data.tags["note"]) == 5000
    names = [a.path for folder in ("", "samples", "all") for a in client_of(run).list_artifacts(tracker.run_id, folder)]
    assert {"config.yaml", "samples/sheet.png", "all/a.txt"} <= set(names)
    assert (run.parent / "mlartifacts").is_dir()
    assert client_of(run).get_experiment_by_name("tests")


def test_nothing_of_the_environment_is_recorded(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    tracker = start(run)
    tracker.log({"loss": 1.0}, 0)
    tracker.finish("FINISHED")
    for file in [run / "mlflow.json", *run.parent.glob("mlflow.db*"), *run.parent.rglob("config.yaml")]:
        assert b"swordfish" not in file.read_bytes()


@pytest.mark.parametrize("state", ["FINISHED", "FAILED", "KILLED"])
def test_end_states_and_one_run_after_resuming(run, state):
    first = start(run)
    log_quickly(first, range(5))
    first.finish(state, timeout=60)
    assert run_of(run).info.status == state
    changed = {**PARAMS, "model.width": 128, "train.extra": "new"}
    second = start(run, params=changed)
    log_quickly(second, range(5, 10))
    assert second.flush(60)
    assert run_of(run).info.status == "RUNNING"
    second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert [step for step, _ in history(run, "loss")] == list(range(10))
    mlflow_run = run_of(run)
    assert mlflow_run.data.params["model.width"] == "64"
    assert mlflow_run.data.params["train.extra"] == "new"
    assert mlflow_run.data.tags["msc.changed"] == "model.width: 64 → 128"
    assert mlflow_run.data.tags["msc.starts"] == "2"
    assert "config-2.yaml" in [a.path for a in client_of(run).list_artifacts(first.run_id)]
    assert len(client_of(run).search_runs([mlflow_run.info.experiment_id])) == 1


def test_attaching_leaves_the_run_to_its_owner(run):
    owner = start(run)
    owner.log({"loss": 1.0}, 1)
    assert owner.flush(60)
    guest = start(run, params={"other": 1}, attach=True)
    guest.log({"evaluate/loss": 0.5}, 1)
    guest.finish("FINISHED")
    mlflow_run = run_of(run)
    assert guest.run_id == owner.run_id
    assert (mlflow_run.info.status, mlflow_run.data.metrics["evaluate/loss"]) == ("RUNNING", 0.5)
    assert "other" not in mlflow_run.data.params
    owner.finish("KILLED")
    assert run_of(run).info.status == "KILLED"


def test_attaching_to_a_run_that_was_never_tracked(run):
    guest = start(run, attach=True)
    guest.log({"evaluate/loss": 0.5}, 1)
    guest.finish("FINISHED")
    assert run_of(run).info.status == "FINISHED"


def test_disabled_does_nothing(tmp_path):
    tracker = Tracker()
    tracker.start(tmp_path / "run", PARAMS, "", "x", enabled=False)
    tracker.log({"loss": 1.0}, 0)
    tracker.artifact(tmp_path)
    tracker.tags({"a": "b"})
    assert tracker.flush()
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_unusual_values_names_and_lengths(run, caplog):
    long = {f"section.key{i}": i for i in range(250)} | {"long": "x" * 100_000, "näme (odd)?": 1}
    tracker = start(run, params=long)
    odd = {
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "loss at λ=2, 50%": 2.0,
        "tensor": torch.tensor(3.0),
    }
    tracker.log(odd, 3)
    tracker.log({f"metric{i}": float(i) for i in range(2500)}, 4)
    tracker.finish("FINISHED")
    mlflow_run = run_of(run)
    assert len(mlflow_run.data.params) == 252
    assert mlflow_run.data.params["long"] == "x" * 499 + "…"
    assert math.isnan(mlflow_run.data.metrics["nan"])
    assert mlflow_run.data.metrics["up"] > 1e300
    assert mlflow_run.data.metrics["down"] < -1e300
    assert mlflow_run.data.metrics["tensor"] == 3.0
    assert mlflow_run.data.metrics["loss at _ 2_ 50_".replace(" 2", "_2")] == 2.0
    assert sum(name.startswith("metric") for name in mlflow_run.data.metrics) == 2500
    assert caplog.records == []


def test_a_deleted_run_is_replaced(run):
    first = start(run)
    first.finish("FINISHED")
    client_of(run).delete_run(first.run_id)
    second = start(run)
    second.log({"loss": 1.0}, 0)
    second.finish("FINISHED")
    assert second.run_id != first.run_id
    assert run_of(run).data.metrics["loss"] == 1.0


def test_a_run_whose_id_was_never_received_is_found_again(run):
    """A job that dies between the creation of its run and the response must not create a second one."""
    first = start(run)
    first.finish("KILLED")
    identity = read_identity(run)
    (run / "mlflow.json").write_text(json.dumps({**identity, "run_id": None}))
    second = start(run)
    second.finish("FINISHED")
    assert second.run_id == first.run_id


def test_system_metrics(run):
    tracker = start(run, config(run, system=True))
    tracker.log({"loss": 1.0}, 0)
    deadline = time.monotonic() + 30
    while tracker.run_id is None or not any(k.startswith("system/") for k in run_of(run).data.metrics):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    tracker.finish("FINISHED")
    assert "system/cpu_utilization_percentage" in run_of(run).data.metrics


def test_unsent_entries_are_sent_by_the_next_start(run, caplog):
    tracker = start(run, config(run, tracking_uri=NOWHERE))
    log_quickly(tracker, range(50))
    tracker.log({"nan": math.nan}, 1)
    (run / "sheet.png").write_bytes(b"png")
    tracker.artifact(run / "sheet.png")
    began = time.perf_counter()
    tracker.finish("KILLED")
    assert time.perf_counter() - began < 6
    assert len(list(run.glob("mlflow-unsent-*.json"))) == 1
    assert any("wait in" in record.message for record in caplog.records)
    # The requeued job reaches a store, and sends what the first one could not.
    again = start(run)
    log_quickly(again, range(50, 60))
    again.finish("FINISHED")
    assert [step for step, _ in history(run, "loss")] == list(range(60))
    assert math.isnan(run_of(run).data.metrics["nan"])
    assert "sheet.png" in [a.path for a in client_of(run).list_artifacts(again.run_id)]
    assert list(run.glob("mlflow-unsent-*")) == []


def test_the_oldest_entries_beyond_the_bound_are_dropped_and_counted(run, caplog):
    tracker = start(run, config(run, tracking_uri=NOWHERE), bound=20)
    log_quickly(tracker, range(50))
    tracker.finish("KILLED")
    assert any("30 oldest entries were dropped" in record.message for record in caplog.records)
    start(run).finish("FINISHED")
    assert [step for step, _ in history(run, "loss")] == list(range(30, 50))


def test_an_outage_is_one_warning_without_passwords(run, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:swordfish@127.0.0.1:9")
    tracker = start(run)
    log_quickly(tracker, range(3))
    time.sleep(4)  # several attempts
    log_quickly(tracker, range(3, 6))
    assert len([record for record in caplog.records if "cannot be used now" in record.message]) == 1
    tracker.finish("KILLED", timeout=5)
    assert "swordfish" not in caplog.text + (run / "mlflow.json").read_text()
    assert without_credentials("http://me:swordfish@host:1/x") == "http://host:1/x"


def test_a_read_only_run_folder_is_no_reason_to_fail(run, caplog, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr("msc.datasets.files.os.replace", refuse)
    tracker = start(run, attach=True)
    tracker.log({"loss": 1.0}, 0)
    tracker.finish("FINISHED")
    assert "not kept" in caplog.text


def unsent_states(run: Path) -> list[str | None]:
    return [json.loads(path.read_text())["state"] for path in sorted(run.glob("mlflow-unsent-*.json"))]


def test_an_end_that_could_not_be_sent_outlives_other_commands(run):
    """The server is away while training ends, and once more while somebody samples; then it is back."""
    away = config(run, tracking_uri=NOWHERE)
    killed_by_the_system = start(run)
    killed_by_the_system.log({"loss": 1.0}, 0)
    assert killed_by_the_system.flush(60)
    resumed = start(run, away)
    resumed.finish("FINISHED", timeout=1)
    assert unsent_states(run) == ["FINISHED"]
    for _ in range(2):
        start(run, away, attach=True).finish("FAILED", timeout=1)
        assert unsent_states(run) == ["FINISHED"]
    assert run_of(run).info.status == "RUNNING"
    start(run, attach=True).finish("FAILED", timeout=60)
    assert (run_of(run).info.status, unsent_states(run)) == ("FINISHED", [])


def test_the_unsent_end_of_an_earlier_process_does_not_end_one_that_goes_on(run):
    start(run, config(run, tracking_uri=NOWHERE)).finish("KILLED", timeout=1)
    assert unsent_states(run) == ["KILLED"]
    resumed = start(run)
    resumed.log({"loss": 1.0}, 0)
    assert resumed.flush(60)
    start(run, attach=True).finish("FINISHED", timeout=60)
    assert run_of(run).info.status == "RUNNING"
    resumed.finish("FINISHED", timeout=60)
    assert run_of(run).info.status == "FINISHED"


def test_the_end_of_killed_processes_is_sent_later_if_the_server_is_away(run, monkeypatch):
    (run / "config.yaml").write_text(yaml.safe_dump({"metrics": {}}))
    killed = start(run)
    killed.log({"loss": 1.0}, 0)
    assert killed.flush(60)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", NOWHERE)
        assert end_mlflow_run(run, "FAILED") is None
    assert (run_of(run).info.status, unsent_states(run)) == ("RUNNING", ["FAILED"])
    start(run, attach=True).finish("FINISHED", timeout=60)
    assert (run_of(run).info.status, unsent_states(run)) == ("FAILED", [])


@contextmanager
def locked_store(database: sqlite3.Connection):
    database.execute("begin exclusive")
    yield
    database.execute("rollback")


@contextmanager
def store_without_a_table(database: sqlite3.Connection):
    database.execute("alter table latest_metrics rename to elsewhere")
    yield
    database.execute("alter table elsewhere rename to latest_metrics")


@pytest.mark.parametrize("fault", [store_without_a_table, pytest.param(locked_store, marks=pytest.mark.slow)])
def test_a_sqlite_store_that_cannot_be_used_is_one_warning(run, caplog, capfd, fault):
    """MLflow waits 20 s for a lock, and logs a traceback of its own at every attempt."""
    tracker = start(run)
    tracker.log({"loss": 2.0}, 0)
    assert tracker.flush(60)
    with sqlite3.connect(run.parent / "mlflow.db", isolation_level=None) as database, fault(database):
        tracker.log({"loss": 1.0}, 1)
        deadline = time.monotonic() + 60
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)  # further attempts
    assert tracker.flush(60)
    tracker.finish("FINISHED")
    assert history(run, "loss") == [(0, 2.0), (1, 1.0)]
    outage, back = caplog.messages
    assert "cannot be used now" in outage and "OperationalError" in outage and "is back" in back
    assert "Traceback" not in capfd.readouterr().err


SCRIPT = """
import pathlib, sys, time
from msc.pretrain.tracking.tracker import MetricsConfig, Tracker
assert "mlflow" not in sys.modules and "torch" not in sys.modules
tracker = Tracker(MetricsConfig(experiment="tests", system=False))
tracker.start(pathlib.Path(sys.argv[1]), {"a": 1}, "a: 1", "x")
assert tracker.run_id is None
tracker.log({"loss": 1.0}, 0)
print("logging", flush=True)
if sys.argv[2] == "terminated":
    import signal, threading
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.05):
        tracker.log({"loss": 2.0}, 1)
    tracker.finish("KILLED")
else:
    tracker.finish("FINISHED", timeout=120)
"""


@pytest.mark.slow
def test_several_processes_open_one_new_store_at_once(tmp_path):
    def one(i: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / f"run{i}"), "finished"]
        return subprocess.run(command, capture_output=True, text=True, timeout=180)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, range(4)))
    for i, result in enumerate(results):
        assert (result.returncode, result.stderr) == (0, "")
        assert run_of(tmp_path / f"run{i}").info.status == "FINISHED"
    assert len({run_of(tmp_path / f"run{i}").info.experiment_id for i in range(4)}) == 1


@pytest.mark.parametrize("wait", [0.0, 8.0], ids=["at once", "later"])
def test_sigterm_leaves_no_run_open(run, wait):
    """Even at once, while MLflow is still being imported: then the next start sends what is missing."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(run), "terminated"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "logging\n"
        time.sleep(0.3 + wait)
        process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        assert process.wait(20) == 0
        assert time.perf_counter() - began < 8
    guest = start(run, attach=True)
    guest.finish("FINISHED", timeout=60)
    assert run_of(run).info.status == "KILLED"
    assert history(run, "loss")[0] == (0, 1.0)


def test_import_needs_neither_mlflow_nor_torch():
    code = "import sys, msc.pretrain.tracking.tracker; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": " "}, "experiment is empty"),
        ({"tracking_uri": "localhost:5000"}, "localhost:5000"),
        ({"tracking_uri": "file:///tmp/mlruns"}, "sqlite:///FILE"),
        ({"tracking_uri": "me:swordfish@host:5000"}, '"host:5000" is not one'),
        ({"tracking_uri": "http://me:swordfish@host:5000"}, "of http://host:5000,.*MLFLOW_TRACKING_PASSWORD"),
        ({"tracking_uri": "postgresql://me:swordfish@host/x"}, "MLFLOW_TRACKING_URI, in the environment"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        MetricsConfig(**changes)
    assert "swordfish" not in str(error.value)


def test_where_a_run_is_tracked(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert MetricsConfig().resolve(run) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert MetricsConfig().resolve(run) == "http://host:5000"
    assert MetricsConfig(tracking_uri="sqlite:///x.db").resolve(run) == "sqlite:///x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:swordfish@host:5000")
    assert MetricsConfig(tracking_uri="http://host:5000").resolve(run) == "http://me:swordfish@host:5000"
    assert MetricsConfig(tracking_uri="http://other:5000").resolve(run) == "http://other:5000"


@pytest.mark.parametrize("uri", ["http://me:swordfish@127.0.0.1:9", "nothing://me:swordfish@host"])
def test_ending_a_run_fails_with_a_warning_without_passwords(run, caplog, monkeypatch, uri):
    """Whether nobody answers, or MLflow names the address that it cannot use."""
    (run / "config.yaml").write_text(yaml.safe_dump({"metrics": {}}))
    (run / "mlflow.json").write_text(json.dumps({"key": "k", "run_id": "r"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert end_mlflow_run(run, "FAILED") is None
    assert "could not be ended" in caplog.text and "swordfish" not in caplog.text


def test_unsent_entries_of_a_killed_process_are_kept_with_its_last_checkpoint(run):
    killed = start(run, config(run, tracking_uri=NOWHERE))
    log_quickly(killed, range(5))
    killed.keep()
    log_quickly(killed, range(5, 8))  # taken again by whoever goes on from the checkpoint
    again = start(run)
    log_quickly(again, range(5, 7))
    assert again.flush(60)
    again.keep()
    again.finish("FINISHED")
    assert history(run, "loss") == [(step, 1 / (step + 1)) for step in range(7)]
    assert list(run.glob("mlflow-unsent-*")) == []
    killed.finish("KILLED", timeout=0)


# A real server ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(folder: Path, port: int):
    folder.mkdir(exist_ok=True)
    store, artifacts = f"sqlite:///{folder}/server.db", f"{folder}/artifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", artifacts]
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_mlflow_run_of_killed_processes_is_ended_for_them(run, caplog):
    (run / "config.yaml").write_text(yaml.safe_dump({"metrics": {"experiment": "tests", "system": False}}))
    assert end_mlflow_run(run, "FAILED") is None, "it was never tracked"
    tracker = start(run)
    tracker.log({"loss": 1.0}, 1)
    assert tracker.flush()
    assert run_of(run).info.status == "RUNNING"
    assert end_mlflow_run(run, "FAILED") == tracker.run_id
    assert run_of(run).info.status == "FAILED"
    assert end_mlflow_run(run, "KILLED") is None and run_of(run).info.status == "FAILED", "an end stays"
    tracker.finish("FINISHED")
    (run / "config.yaml").write_text(yaml.safe_dump({"metrics": {"tracking_uri": NOWHERE}}))
    assert not caplog.records
    assert end_mlflow_run(run, "FAILED") is None
    assert "could not be ended" in caplog.text


@pytest.mark.slow
def test_a_server_that_starts_late_and_restarts(tmp_path, caplog):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run = tmp_path / "runs" / "first"
    tracker = start(run, config(run, tracking_uri=uri, system=True))
    log_quickly(tracker, range(200), odd=math.nan)  # nobody listens yet
    (run / "sheet.png").write_bytes(b"png")
    tracker.artifact(run / "sheet.png", "samples")
    assert tracker.run_id is None
    with server(tmp_path / "server", port):
        assert tracker.flush(90)
        log_quickly(tracker, range(200, 400), odd=math.inf)
        assert tracker.flush(60)
        assert [step for step, _ in history(run, "loss", uri)] == list(range(400))
    log_quickly(tracker, range(400, 600))  # gone again
    time.sleep(3)
    with server(tmp_path / "server", port):
        assert tracker.flush(90)
        tracker.finish("FINISHED")
        mlflow_run = run_of(run, uri)
        assert mlflow_run.info.status == "FINISHED"
        assert history(run, "loss", uri) == [(step, 1 / (step + 1)) for step in range(600)]
        assert mlflow_run.data.metrics["odd"] > 1e300
        assert math.isnan(history(run, "odd", uri)[0][1])
        assert any(name.startswith("system/") for name in mlflow_run.data.metrics)
        names = [a.path for a in client_of(run, uri).list_artifacts(tracker.run_id, "samples")]
        assert names == ["samples/sheet.png"]

        again = start(run, config(run, tracking_uri=uri))
        log_quickly(again, range(600, 610))
        again.finish("FAILED")
        assert again.run_id == tracker.run_id
        assert run_of(run, uri).info.status == "FAILED"
        assert len(history(run, "loss", uri)) == 610
        assert len(client_of(run, uri).search_runs([mlflow_run.info.experiment_id])) == 1
    assert len([r for r in caplog.records if "cannot be used now" in r.message]) == 2
    assert len([r for r in caplog.records if "is back" in r.message]) == 2


def test_a_server_that_never_answers_does_not_delay_the_end(run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # takes connections, says nothing
        tracker = start(run, config(run, tracking_uri=f"http://127.0.0.1:{listener.getsockname()[1]}"))
        log_quickly(tracker, range(20))
        began = time.perf_counter()
        tracker.finish("KILLED", timeout=2)
        assert time.perf_counter() - began < 3
    assert len(list(run.glob("mlflow-unsent-*.json"))) == 1


# The meter -------------------------------------------------------------------------------------------------


def test_meter_counts_and_starts_anew():
    meter = Meter(torch.device("cpu"))
    for _ in range(4):
        with meter.waiting():
            time.sleep(0.02)
        time.sleep(0.02)
        meter.step(tokens=1000, clips=4, flops=1e12)
    values = meter.read()
    assert values["tokens_per_s"] == pytest.approx(250 * values["clips_per_s"])
    assert values["clips_per_s"] * values["step_s"] == pytest.approx(4)
    assert 0.2 < values["data_wait"] < 0.8
    assert "mfu" not in values
    assert meter.read()["tokens_per_s"] == 0


def test_share_of_the_peak():
    assert mfu(989e12 / 2, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert mfu(989e12, "NVIDIA H200") == pytest.approx(1)
    assert mfu(756e12, "NVIDIA H100 PCIe") == pytest.approx(1)
    assert mfu(312e12, "NVIDIA A100-SXM4-80GB") == pytest.approx(1)
    assert mfu(1e12, "cpu") is None


def test_memory_of_this_process():
    assert 0.01 < memory(torch.device("cpu"))["memory_gib"] < 1000
