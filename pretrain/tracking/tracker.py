"""What a run reports: one MLflow run per training run, written by a background thread, and the loop's meter.

Tracking never blocks and never fails training. Calls put values into a bounded queue and return; a thread
imports MLflow, opens the store and sends. While the store cannot be reached the queue waits; what is still
unsent when the process must end is kept in the run folder and sent by the next process of this run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from msc.datasets.files import write_atomically

from .mlflow_store import SYSTEM_SECONDS, File, Point, Store, refused, settle_run, without_credentials, without_user
from .throughput import Meter, memory, mfu

__all__ = ["Meter", "MetricsConfig", "Tracker", "memory", "mfu", "end_mlflow_run"]

logger = logging.getLogger(__name__)

State = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class MetricsConfig:
    """tracking_uri: of MLflow, http://… or sqlite:///…; empty: MLFLOW_TRACKING_URI, else mlflow.db beside the
    run folder; "none": no tracking. It lands in files and in MLflow, so a user's name and password belong in the
    environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI. experiment: its name
    there. system: also record CPU, memory, disk, network and GPU use. parent: id of the MLflow run under which this
    one is shown (a sweep's)."""

    tracking_uri: str = ""
    experiment: str = "msc"
    system: bool = True
    parent: str = ""

    def __post_init__(self):
        if not self.experiment.strip():
            raise ValueError("metrics.experiment is empty; give the experiment a name")
        uri = self.tracking_uri
        if uri not in ("", "none") and (
            uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks"))
        ):
            raise ValueError(
                f'metrics.tracking_uri "{without_credentials(uri)}" is not one that MLflow can write to; '
                "use http://HOST:PORT, sqlite:///FILE or none"
            )
        if without_credentials(uri) != uri:
            raise ValueError(
                f"metrics.tracking_uri holds a user's name or password of {without_credentials(uri)}, and would be "
                "written to files and MLflow: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole "
                "address as MLFLOW_TRACKING_URI, in the environment"
            )

    def resolve(self, run: Path) -> str:
        """The tracking URI used for the run folder `run`; with the user's name and password where the environment has
        them for this very address."""
        own = os.environ.get("MLFLOW_TRACKING_URI", "")
        if self.tracking_uri and self.tracking_uri != without_credentials(own):
            return self.tracking_uri
        return own or f"sqlite:///{Path(run).resolve().parent}/mlflow.db"


def set_client_timeouts() -> None:
    """Fail soon and retry here, rather than hang in a library; and a training job phones nobody."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def end_mlflow_run(run: Path, state: State) -> str | None:
    """Give the MLflow run of a folder the end that its processes could not give it: they were killed. Its id where it
    was still RUNNING; None where it was not, is not tracked, or cannot be reached (which is a warning)."""
    set_client_timeouts()
    uri = ""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())["metrics"]
        uri = MetricsConfig(**values).resolve(run)
        return settle_run(uri, run, state)
    except Exception as error:  # the job is over either way
        reason = without_user(str(error), uri)
        logger.warning("mlflow: the end of %s could not be told: %s: %.200s", run, type(error).__name__, reason)
        return None


class Tracker:
    """The MLflow run of a training run. Calls return at once; only `flush` and `finish` wait, with a bound.

    `start` continues the run named in RUN/mlflow.json if there is one, so that resuming, evaluating, sampling
    and exporting all write to it. Trouble is a warning of this module's logger, once per outage.
    """

    def __init__(self, config: MetricsConfig | None = None, bound: int = 20_000):
        """bound: calls of `log` kept while the store cannot be reached; beyond it the oldest are dropped."""
        self.config, self.bound = config or MetricsConfig(), bound
        self._store: Store | None = None
        self._wake = threading.Condition()  # guards the queues
        self._points: deque[Point] = deque()
        self._busy: list[Point] = []  # taken from the queue, not yet sent
        self._files: deque[File] = deque()
        self._files_at = self._system_at = 0.0  # not before this time
        self._loaded: list[Path] = []  # what earlier processes left unsent
        self._state: State | None = None  # to end the run with
        self._ended = self._closing = self._down = self._files_down = False
        self._dropped = 0

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until the store has answered."""
        return self._store.run_id if self._store else None

    def start(
        self,
        run: Path,
        params: Mapping[str, Any],
        text: str,
        name: str,
        resume: str | None = None,
        enabled: bool = True,
        attach: bool = False,
    ) -> None:
        """Begin, or continue, the MLflow run of the folder `run`.

        params: flat configuration. text: the resolved configuration as YAML, kept as an artifact.
        name: shown in MLflow. resume: id of the MLflow run to continue, if not the one in the run folder.
        enabled: False makes every call do nothing (all ranks but one).
        attach: only add to the run that training owns: its state, parameters and system metrics stay alone.
        """
        if not enabled or self.config.tracking_uri == "none":
            return
        assert self._store is None, "a tracker is started once"
        set_client_timeouts()
        self._run, self._text = Path(run), text
        uri = self.config.resolve(self._run)
        self._store = Store(uri, self.config.experiment, self._run, params, name, resume, attach, self.config.parent)
        self._thread = threading.Thread(target=self._work, args=(self._store,), name="msc-metrics", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at `step`; NaN and infinities are kept as such."""
        self._put(Point({name: float(value) for name, value in values.items()}, step, int(time.time() * 1000)))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._put(Point({name: str(value) for name, value in values.items()}, None, int(time.time() * 1000)))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, or all of a folder, into `folder` of the artifacts. It is read later: keep it."""
        if self._store is not None:
            with self._wake:
                self._files.append(File(str(Path(path).resolve()), folder))
                self._wake.notify_all()

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all is sent, at most `timeout` seconds; whether it was."""
        if self._store is None:
            return True
        with self._wake:
            return self._wake.wait_for(lambda: not (self._points or self._busy or self._files), timeout)

    def keep(self) -> None:
        """Write what is not yet sent to the run folder: called with every checkpoint, so that a run that is killed
        while the store is away, and goes on from there, loses nothing."""
        if self._store is None or self._closing:
            return
        path = self._run / "mlflow-unsent-live.json"
        with self._wake:
            points = [*self._busy, *self._points]
            if points or self._files:
                self._write_left(path, points, None)
            elif path.exists():
                path.unlink()

    def finish(self, state: State, timeout: float | None = None) -> None:
        """Send what is left and end the run as `state`, within `timeout` seconds (30, for KILLED 5).

        What could not be sent stays in the run folder, for the next process of this run to send.
        """
        if self._store is None or self._closing:
            return
        with self._wake:
            self._state, self._closing = state, True
            self._wake.notify_all()
        self._thread.join((5.0 if state == "KILLED" else 30.0) if timeout is None else timeout)
        with self._wake:
            self._keep(self._store)
        if self._dropped:
            logger.warning("mlflow: %d oldest entries were dropped, more than %d waited", self._dropped, self.bound)

    # The queue, and the thread that empties it ----------------------------------------------------------

    def _put(self, point: Point) -> None:
        if self._store is None or self._closing:
            return
        with self._wake:
            self._points.append(point)
            self._trim()
            self._wake.notify_all()

    def _trim(self) -> None:
        while len(self._points) > self.bound:
            self._points.popleft()
            self._dropped += 1

    def _work(self, store: Store) -> None:
        delay = 1.0
        self._load()
        while True:
            try:
                self._turn(store)
            except Exception as error:  # whatever it is, training must not notice
                if not self._down:
                    self._warn(store, "cannot be used now; metrics are kept and sent later", error)
                self._down = True
                with self._wake:
                    if self._closing:
                        return
                    self._wake.wait_for(lambda: self._closing, delay)
                delay = min(2 * delay, 30.0)
                continue
            if self._down:
                logger.warning("mlflow: %s is back; all that waited is sent", without_credentials(store.uri))
            delay, self._down = 1.0, False
            with self._wake:
                self._wake.notify_all()  # for flush
                if self._closing and not self._points and (self._ended or not store.owns):
                    return
                now, later = time.monotonic(), [float(SYSTEM_SECONDS)]
                later += [self._system_at - now] if self._samples(store) else []
                later += [self._files_at - now] if self._files else []
                self._wake.wait_for(lambda: self._points or self._closing or self._files_due(), max(0.0, min(later)))

    def _turn(self, store: Store) -> None:
        """Send everything that waits. Raises where the store cannot be reached."""
        if store.run_id is None:
            store.connect()
            if store.owns and self._text:
                name = "config.yaml" if store.starts == 1 else f"config-{store.starts}.yaml"
                self._files.append(File(name, text=self._text))
            elif store.running and self._left_state and not store.owns:
                store.end(self._left_state)  # the owner could not say so before it had to go
        if self._samples(store) and time.monotonic() >= self._system_at and not self._closing:
            self._system_at = time.monotonic() + SYSTEM_SECONDS
            self._put(store.system_metrics())
        while self._points:
            with self._wake:
                self._busy = [self._points.popleft() for _ in range(min(200, len(self._points)))]
            try:
                store.send(self._busy)
            except Exception as error:
                if not refused(error):
                    with self._wake:
                        self._points.extendleft(reversed(self._busy))
                        self._busy = []
                        self._trim()
                    raise
                self._warn(store, f"refused {len(self._busy)} entries, which are dropped", error)
            with self._wake:
                self._busy = []
        if self._closing and store.owns and not self._ended:  # before the artifacts: there may be only seconds
            store.end(str((store.attach and self._left_state) or self._state))
            self._ended = True
        while self._files_due():
            self._upload(store, self._files[0])

    def _upload(self, store: Store, file: File) -> None:
        """Try one artifact. Artifacts may have a store of their own: its trouble must not hold up metrics."""
        try:
            if file.text is not None or Path(file.path).exists():
                store.upload(file)
            else:
                logger.warning("mlflow: the artifact %s is gone and was not sent", file.path)
        except Exception as error:
            if not refused(error):
                if not self._files_down:
                    self._warn(store, f"does not take the artifact {file.path} now; it is sent later", error)
                self._files_down, self._files_at = True, time.monotonic() + 30
                return
            self._warn(store, f"refused the artifact {file.path}", error)
        with self._wake:
            self._files.popleft()
        self._files_down = False

    def _files_due(self) -> bool:
        return bool(self._files) and time.monotonic() >= self._files_at

    def _samples(self, store: Store) -> bool:
        return self.config.system and store.owns

    def _warn(self, store: Store, what: str, error: Exception) -> None:
        reason = without_user(str(error), store.uri).strip().splitlines() or [""]
        logger.warning(
            "mlflow: %s %s (%s: %.200s)", without_credentials(store.uri), what, type(error).__name__, reason[0]
        )

    # What could not be sent in time -----------------------------------------------------------------------

    def _keep(self, store: Store) -> None:
        points, unended = [*self._busy, *self._points], store.owns and not self._ended
        if points or self._files or unended:
            path = self._run / f"mlflow-unsent-{time.time_ns()}.json"
            if not self._write_left(path, points, self._state if unended else None):
                return
            logger.warning("mlflow: %d entries wait in %s for the next start of this run", len(points), path)
        for old in (*self._loaded, self._run / "mlflow-unsent-live.json"):
            old.unlink(missing_ok=True)

    def _write_left(self, path: Path, points: list[Point], state: str | None) -> bool:
        left = {
            "points": [astuple(point) for point in points],
            "files": [astuple(file) for file in self._files],
            "state": state,
        }
        try:
            write_atomically(path, json.dumps(left).encode(), sync=False)
        except OSError as error:
            logger.warning("mlflow: %d entries are only in memory, and lost if it goes: %s", len(points), error)
            return False
        return True

    def _load(self) -> None:
        self._left_state: str | None = None
        for path in sorted(self._run.glob("mlflow-unsent-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                left = json.loads(path.read_text())
                points, files = [Point(*p) for p in left["points"]], [File(*f) for f in left["files"]]
                with self._wake:
                    self._points.extendleft(reversed(points))
                    self._files.extendleft(reversed(files))
                self._left_state = left["state"] or self._left_state
                self._loaded.append(path)
