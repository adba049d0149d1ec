"""The MLflow side of `metrics.Tracker`: finds or makes the run and sends to it. Only its thread calls this.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msc.datasets.files import locked, write_atomically

logger = logging.getLogger("msc.pretrain.tracking.tracker")

PARAM_LENGTH = 500  # the limit of older servers; newer ones take 6000, which nobody reads on a page
TAG_LENGTH = 5000
SYSTEM_SECONDS = 10


@dataclass(frozen=True)
class Point:
    """One call of `log` (values are floats) or of `tags` (step is None, values are strings)."""

    values: dict[str, Any]
    step: int | None
    milliseconds: int


@dataclass(frozen=True)
class File:
    """An artifact: a file or folder at `path` for `folder` of the run, or a text to be named `path`."""

    path: str
    folder: str = ""
    text: str | None = None


class Store:
    """One run in one MLflow store. See `Tracker.start` for the arguments."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run: Path,
        params: Mapping[str, Any],
        name: str,
        resume: str | None,
        attach: bool,
        parent: str = "",
    ):
        self.uri, self.experiment, self.run, self.name = uri, experiment, run, name
        self.params, self.attach = {_key(k): str(v) for k, v in params.items()}, attach
        self.owns, self.parent = not attach, parent
        self.run_id: str | None = None
        self.running = False  # when it was found
        self.starts = 1  # of the run by its owner, this one included
        self.system: Any = None
        # The key is written before the store has answered, and tagged onto the run: a run whose creation was
        # never confirmed, or that a requeued job did not live to hear of, is found again, not made twice.
        known = read_identity(run)
        self.key = known.get("key") or uuid.uuid4().hex
        self.wanted = resume or known.get("run_id")
        self._write_identity(self.wanted)

    def connect(self) -> None:
        """Import MLflow, open the store, find or make the run. May be called again after it raised."""
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        with _first_use(self.uri):
            client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            experiment_id = self._create_experiment(client) if experiment is None else experiment.experiment_id
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise ConnectionError(f"the experiment {self.experiment} was deleted; restore it there")
        found = self._find(client, experiment_id)
        if found is None:
            tags = {"msc.key": self.key, "msc.run": str(self.run)}
            tags |= {"mlflow.parentRunId": self.parent} if self.parent else {}
            found = client.create_run(experiment_id, run_name=self.name, tags=tags)
            self.owns = True
        elif self.owns:
            client.update_run(found.info.run_id, status="RUNNING")
        self.client, self.running = client, found.info.status == "RUNNING"
        self.starts = int(found.data.tags.get("msc.starts", 0)) + 1
        self._write_identity(found.info.run_id)
        self._started = found.info.start_time / 1000
        if self.owns:
            try:
                self._describe(found)
            except Exception as error:
                if not refused(error):
                    raise
                logger.warning("mlflow: the run's parameters were refused: %s", error)
        self.run_id = found.info.run_id  # last: from here on the tracker sends

    def send(self, points: Sequence[Point]) -> None:
        """Send points in as few requests as MLflow's limits allow. Sending one twice does no harm."""
        assert self.run_id is not None
        self._send(self.run_id, points)

    def _send(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(_key(name), value, point.milliseconds, point.step)
            for point in points
            if point.step is not None
            for name, value in point.values.items()
        ]
        tags = {k: str(v)[:TAG_LENGTH] for point in points if point.step is None for k, v in point.values.items()}
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000], synchronous=True)
        entries = [RunTag(_key(name), value) for name, value in tags.items()]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run_id, tags=entries[start : start + 100], synchronous=True)

    def upload(self, file: File) -> None:
        """Upload a file, a folder with all it holds, or a text."""
        if file.text is not None:
            self.client.log_text(str(self.run_id), file.text, file.path)
        elif Path(file.path).is_dir():
            self.client.log_artifacts(str(self.run_id), file.path, artifact_path=file.folder or None)
        else:
            self.client.log_artifact(str(self.run_id), file.path, artifact_path=file.folder or None)

    def end(self, state: str) -> None:
        self.client.set_terminated(str(self.run_id), state)

    def system_metrics(self) -> Point:
        """What MLflow's own monitors see now. The step counts time since the run began."""
        if self.system is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Its own thread is not used: that one ends for good at the first request that fails.
            self.system = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri).monitors
        values: dict[str, float] = {}
        for monitor in self.system:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        step = max(0, int((time.time() - self._started) / SYSTEM_SECONDS))
        return Point({f"system/{k}": float(v) for k, v in values.items()}, step, int(time.time() * 1000))

    # Inside -------------------------------------------------------------------------------------------

    def _create_experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        file = _sqlite_file(self.uri)
        # Without a place of their own the artifacts of a sqlite store land in the current folder.
        place = (file.parent / "mlartifacts").as_uri() if file else None
        try:
            return client.create_experiment(self.experiment, artifact_location=place)
        except MlflowException:  # somebody else was quicker
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise
            return experiment.experiment_id

    def _find(self, client: Any, experiment_id: str) -> Any:
        """The run to continue, or None. A run that was deleted, or lives in another store, is given up."""
        from mlflow.exceptions import MlflowException

        if self.wanted:
            try:
                found = client.get_run(self.wanted)
                if found.info.lifecycle_stage == "active":
                    return found
            except MlflowException as error:
                if not refused(error):
                    raise
        found = client.search_runs([experiment_id], f"tags.`msc.key` = '{self.key}'", max_results=1)
        if not found and self.wanted:
            logger.warning("mlflow: run %s is not in %s; a new one is made", self.wanted, without_credentials(self.uri))
        return found[0] if found else None

    def _describe(self, found: Any) -> None:
        """Parameters cannot be changed in MLflow: on resuming, new ones are added, changes become a tag."""
        from mlflow.entities import Param

        known, tags = found.data.params, code_version()
        cut = {k: v if len(v) <= PARAM_LENGTH else v[: PARAM_LENGTH - 1] + "…" for k, v in self.params.items()}
        new = [Param(k, v) for k, v in cut.items() if k not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(found.info.run_id, params=new[start : start + 100], synchronous=True)
        if changed := [f"{k}: {known[k]} → {v}" for k, v in cut.items() if known.get(k, v) != v]:
            tags["msc.changed"] = "\n".join(changed)
        self._send(found.info.run_id, [Point({**tags, "msc.starts": self.starts}, None, 0)])

    def _write_identity(self, run_id: str | None) -> None:
        known = {
            "key": self.key,
            "run_id": run_id,
            "tracking_uri": without_credentials(self.uri),
            "experiment": self.experiment,
        }
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run / "mlflow.json", f"{json.dumps(known, indent=1)}\n".encode(), sync=False)
        except OSError as error:  # a run folder that is only read
            logger.warning("mlflow: the run's id is not kept: %s", error)


def read_identity(run: Path) -> dict[str, Any]:
    """What mlflow.json of a run folder says (key, run_id or None, tracking_uri, experiment), or nothing."""
    try:
        known = json.loads((Path(run) / "mlflow.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def settle_run(uri: str, run: Path, state: str) -> str | None:
    """See `metrics.settle`; raises where the store cannot be reached."""
    run_id = read_identity(run).get("run_id")
    if run_id is None or uri == "none":
        return None
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if client.get_run(run_id).info.status != "RUNNING":
        return None
    client.set_terminated(run_id, state)
    return str(run_id)


def refused(error: Exception) -> bool:
    """Whether the store answered and will not take it, so that sending the same again is of no use."""
    answers = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
    return getattr(error, "error_code", None) in answers


def without_credentials(uri: str) -> str:
    """A tracking URI without the user's name and password."""
    return without_user(uri, uri)


def without_user(text: str, uri: str) -> str:
    """A text, such as an error's, without the user's name and password of a tracking URI."""
    user, sign, _ = urlsplit(uri if "://" in uri else f"//{uri}").netloc.rpartition("@")
    return text.replace(user + sign, "") if sign else text


def code_version() -> dict[str, str]:
    """Tags that name the code: the version, and the commit where the code runs from a git checkout."""
    tags = {}
    with contextlib.suppress(PackageNotFoundError):
        tags["msc.version"] = version("msc-video")
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():  # not just any repository above an installed package
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(root)]
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
            tags["mlflow.source.git.commit"] = commit.stdout.strip()
            state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
            tags["msc.modified"] = str(bool(state.stdout.strip()))
    return tags


def _key(name: str) -> str:
    """A name that every MLflow store takes."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """One process at a time opens a sqlite store: the migrations of a new one must not run twice at once."""
    file = _sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(file.name + ".lock"), required=False):  # the caller retries
        yield
