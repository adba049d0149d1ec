"""MLflow store: finds or creates the MLflow run of a run folder, and sends to it. Used by the tracker's thread only.

Everything here may block or raise; MLflow itself is imported by `Store.connect` and not before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msc.datasets.files import locked, write_atomically

from ..run_folder import RunFolder

logger = logging.getLogger(__name__)

PARAM_LENGTH = 500  # the limit of older servers; newer ones take 6000, which nobody reads on a page
TAG_LENGTH = 5000
REQUEST_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}  # entries of one request
SYSTEM_METRICS_S = 10


@dataclass(frozen=True)
class Entry:
    """One call of `log` (values are floats) or of `tags` (step is None, values are strings)."""

    values: dict[str, Any]
    step: int | None
    milliseconds: int


@dataclass(frozen=True)
class Artifact:
    """A file or folder at `path` for `folder` of the MLflow run, or a text to be named `path`."""

    path: str
    folder: str = ""
    text: str | None = None


@dataclass
class Store:
    """One run in one MLflow store. resume, attach: as in `Tracker.start`. parent: id of the MLflow run above it.

    run_id: None until connected. starts: of the run by its owner, this one included. was_running: before this start.
    """

    uri: str
    experiment: str
    run: Path
    params: Mapping[str, Any]
    name: str
    resume: str | None
    attach: bool
    parent: str = ""
    run_id: str | None = field(default=None, init=False)
    starts: int = field(default=1, init=False)
    was_running: bool = field(default=False, init=False)
    _monitors: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        # The key is written before the store has answered, and tagged onto the run: a run whose creation was never
        # confirmed, as the job was killed or requeued first, is found again instead of created twice.
        identity = read_identity(self.run)
        self.key = identity.get("key") or uuid.uuid4().hex
        self.resume = self.resume or identity.get("run_id")
        self.owns = not self.attach
        self._write_identity(self.resume)

    def connect(self) -> None:
        """Import MLflow, open the store, find or create the run. May be called again after it raised."""
        path = self.uri.removeprefix("sqlite:///")
        file = Path(path).resolve() if path != self.uri else None
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        # One process at a time opens a sqlite store: the migrations of a new one must not run twice at once. Where
        # the file system has no locks, the caller's next attempt succeeds.
        with locked(file.with_name(file.name + ".lock"), required=False) if file else nullcontext():
            self.client = open_client(self.uri)
            experiment_id = self._find_experiment(file)
        run = self._find_run(experiment_id)
        if run is None:
            tags = {"msc.key": self.key, "msc.run": str(self.run)}
            tags |= {"mlflow.parentRunId": self.parent} if self.parent else {}
            run = self.client.create_run(experiment_id, run_name=self.name, tags=tags)
            self.owns = True
        elif self.owns:
            self.client.update_run(run.info.run_id, status="RUNNING")
        self.was_running = run.info.status == "RUNNING"
        self.starts = int(run.data.tags.get("msc.starts", 0)) + 1
        self._write_identity(run.info.run_id)
        self._began = run.info.start_time / 1000
        if self.owns:
            try:
                self._send_params(run)
            except Exception as error:
                if not is_rejected(error):
                    raise
                logger.warning("mlflow: the run's parameters were rejected: %s", error)
        self.run_id = run.info.run_id  # last: from here on the tracker sends

    def send(self, entries: Sequence[Entry], run_id: str | None = None) -> None:
        """Send entries in as few requests as MLflow's limits allow. Sending one twice does no harm."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(_valid_name(name), value, entry.milliseconds, entry.step)
            for entry in entries
            if entry.step is not None
            for name, value in entry.values.items()
        ]
        tags = {name: str(value) for entry in entries if entry.step is None for name, value in entry.values.items()}
        run_id = run_id or str(self.run_id)
        self._log_batches(run_id, "metrics", metrics)
        self._log_batches(run_id, "tags", [RunTag(_valid_name(k), v[:TAG_LENGTH]) for k, v in tags.items()])

    def upload(self, artifact: Artifact) -> None:
        """Upload a file, a folder with all it holds, or a text."""
        if artifact.text is not None:
            self.client.log_text(str(self.run_id), artifact.text, artifact.path)
        else:
            log = self.client.log_artifacts if Path(artifact.path).is_dir() else self.client.log_artifact
            log(str(self.run_id), artifact.path, artifact_path=artifact.folder or None)

    def end(self, state: str) -> None:
        self.client.set_terminated(str(self.run_id), state)

    def system_metrics(self) -> Entry:
        """What MLflow's own monitors measure now. The step counts time since the run began."""
        if not self._monitors:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Its own thread is not used: that one ends for good at the first request that fails.
            self._monitors = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri).monitors
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        step = max(0, int((time.time() - self._began) / SYSTEM_METRICS_S))
        return Entry({f"system/{k}": float(v) for k, v in values.items()}, step, int(time.time() * 1000))

    def _log_batches(self, run_id: str, kind: str, entities: Sequence[Any]) -> None:
        for start in range(0, len(entities), REQUEST_LIMITS[kind]):
            batch: Any = {kind: entities[start : start + REQUEST_LIMITS[kind]]}
            self.client.log_batch(run_id, **batch, synchronous=True)

    def _find_experiment(self, file: Path | None) -> str:
        """The id of the experiment, created where it does not exist. file: of a sqlite store."""
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            # Without a place of their own the artifacts of a sqlite store land in the current folder.
            location = (file.parent / "mlartifacts").as_uri() if file else None
            try:
                return str(self.client.create_experiment(self.experiment, artifact_location=location))
            except MlflowException:
                if (experiment := self.client.get_experiment_by_name(self.experiment)) is None:
                    raise  # otherwise another process was faster
        if experiment.lifecycle_stage == "deleted":
            raise ConnectionError(f"the experiment {self.experiment} was deleted; restore it there")
        return str(experiment.experiment_id)

    def _find_run(self, experiment_id: str) -> Any:
        """The run to continue, or None. A run that was deleted, or lives in another store, is given up."""
        from mlflow.exceptions import MlflowException

        if self.resume:
            try:
                run = self.client.get_run(self.resume)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if not is_rejected(error):
                    raise
        runs = self.client.search_runs([experiment_id], f"tags.`msc.key` = '{self.key}'", max_results=1)
        if not runs and self.resume:
            uri = without_credentials(self.uri)
            logger.warning("mlflow: run %s is not in %s; a new one is created", self.resume, uri)
        return runs[0] if runs else None

    def _send_params(self, run: Any) -> None:
        """Parameters cannot be changed in MLflow: on resuming, new ones are added, changes become a tag."""
        from mlflow.entities import Param

        logged, tags = run.data.params, code_version()
        params = {_valid_name(name): str(value) for name, value in self.params.items()}
        params = {k: v if len(v) <= PARAM_LENGTH else v[: PARAM_LENGTH - 1] + "…" for k, v in params.items()}
        self._log_batches(run.info.run_id, "params", [Param(k, v) for k, v in params.items() if k not in logged])
        if changed := [f"{k}: {logged[k]} → {v}" for k, v in params.items() if logged.get(k, v) != v]:
            tags["msc.changed"] = "\n".join(changed)
        self.send([Entry({**tags, "msc.starts": self.starts}, None, 0)], run.info.run_id)

    def _write_identity(self, run_id: str | None) -> None:
        uri = without_credentials(self.uri)
        identity = {"key": self.key, "run_id": run_id, "tracking_uri": uri, "experiment": self.experiment}
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            write_atomically(RunFolder(self.run).mlflow, (json.dumps(identity, indent=1) + "\n").encode(), sync=False)
        except OSError as error:  # a read-only run folder
            logger.warning("mlflow: the run's id is not kept: %s", error)


def open_client(uri: str) -> Any:
    """An MLflow client whose errors are raised and not logged as well: its module for databases logs a traceback at
    every attempt to use a sqlite file that is locked."""
    from mlflow import MlflowClient

    for name, level in {"mlflow": "WARNING", "alembic": "WARNING", "mlflow.store.db.utils": "CRITICAL"}.items():
        logging.getLogger(name).setLevel(level)
    return MlflowClient(tracking_uri=uri)


def read_identity(run: Path) -> dict[str, Any]:
    """Contents of mlflow.json: {"key", "run_id" (may be None), "tracking_uri", "experiment"}; {} if there is none."""
    try:
        identity = json.loads(RunFolder(Path(run)).mlflow.read_text())
    except (OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) else {}


def is_rejected(error: Exception) -> bool:
    """Whether the store answered and will not take it, so that sending the same again is of no use."""
    answers = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
    return getattr(error, "error_code", None) in answers


def without_credentials(uri: str, text: str | None = None) -> str:
    """A tracking URI, or a text such as an error message that quotes it, without the URI's user name and password."""
    text = uri if text is None else text
    user, sign, _ = urlsplit(uri if "://" in uri else f"//{uri}").netloc.rpartition("@")
    return text.replace(user + sign, "") if sign else text


def code_version() -> dict[str, str]:
    """Tags that name the code: the version, and the commit where the code runs from a git checkout."""
    tags = {}
    with contextlib.suppress(PackageNotFoundError):
        tags["msc.version"] = version("msc-video")
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():  # not just any repository above an installed package
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(root)]
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
            tags["mlflow.source.git.commit"] = commit.stdout.strip()
            state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
            tags["msc.modified"] = str(bool(state.stdout.strip()))
    return tags


def _valid_name(name: str) -> str:
    """A name that every MLflow store takes."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]
