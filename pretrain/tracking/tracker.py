"""Tracker: one MLflow run per training run, written by a background thread.

Tracking never blocks and never fails training. Calls put values into a bounded queue and return; a thread imports
MLflow, opens the store and sends. While the store cannot be reached the queue waits; what is still unsent when the
process must end is kept in the run folder and sent by the next process of this run. MLflow's own asynchronous logging
drops what its retries did not bring through, and all that waits when the process is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from msc.datasets.files import write_atomically

from ..run_folder import RunFolder
from .mlflow_store import (
    SYSTEM_METRICS_S,
    Artifact,
    Entry,
    Store,
    is_rejected,
    open_client,
    read_identity,
    without_credentials,
)

logger = logging.getLogger(__name__)

State = Literal["FINISHED", "FAILED", "KILLED"]
CLIENT_SETTINGS = {  # fail soon and retry here, rather than hang in a library; no telemetry from training jobs
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
BATCH = 200  # entries sent at once
UPLOAD_RETRY_S = 30
FINISH_TIMEOUT_S = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}


@dataclass(frozen=True)
class MetricsConfig:
    """tracking_uri: of MLflow, http://… or sqlite:///…; empty: MLFLOW_TRACKING_URI, else mlflow.db beside the
    run folder; "none": no tracking. It is written to files and MLflow, so a user's name and password belong in the
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
        uri, public = self.tracking_uri, without_credentials(self.tracking_uri)
        has_scheme = "://" in uri or uri.startswith("databricks")
        if uri not in ("", "none") and (uri.startswith("file:") or not has_scheme):
            raise ValueError(
                f'metrics.tracking_uri "{public}" is not one that MLflow can write to; '
                "use http://HOST:PORT, sqlite:///FILE or none"
            )
        if public != uri:
            raise ValueError(
                f"metrics.tracking_uri holds a user's name or password of {public}, and would be written to files "
                "and MLflow: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as "
                "MLFLOW_TRACKING_URI, in the environment"
            )

    def resolve(self, run: Path) -> str:
        """The tracking URI used for the run folder `run`; with the user's name and password where the environment has
        them for this very address."""
        environment = os.environ.get("MLFLOW_TRACKING_URI", "")
        if self.tracking_uri and self.tracking_uri != without_credentials(environment):
            return self.tracking_uri
        return environment or f"sqlite:///{Path(run).resolve().parent}/mlflow.db"


def end_mlflow_run(run: Path, state: State) -> str | None:
    """End the MLflow run of a folder whose processes were killed. Its id where it was still RUNNING; None where it was
    not, is not tracked, or cannot be reached (which is a warning)."""
    set_client_defaults()
    uri = ""
    try:
        uri = MetricsConfig(**yaml.safe_load(RunFolder(run).config.read_text())["metrics"]).resolve(run)
        identity = read_identity(run)
        if not identity or uri == "none":
            return None
        if (run_id := identity.get("run_id")) is None:  # the store has not answered so far
            keep_unsent(run, state=state)
            return None
        client = open_client(uri)
        if client.get_run(run_id).info.status != "RUNNING":
            return None
        client.set_terminated(run_id, state)
        return str(run_id)
    except Exception as error:  # the job is over either way
        reason = without_credentials(uri, str(error))
        logger.warning("mlflow: %s could not be ended as %s: %s: %.200s", run, state, type(error).__name__, reason)
        if read_identity(run):
            keep_unsent(run, state=state)
        return None


def keep_unsent(
    run: Path, entries: Iterable[Entry] = (), artifacts: Iterable[Artifact] = (), state: str | None = None,
    path: Path | None = None,
) -> bool:  # fmt: skip
    """Write to the run folder what the next process of this run has to send; False, with a warning, if that fails.

    state: to end the MLflow run with, if nobody does before. path: to replace, by default a new file."""
    path = path or run / f"mlflow-unsent-{time.time_ns()}.json"
    unsent: dict[str, Any] = {
        "points": list(map(astuple, entries)),
        "files": list(map(astuple, artifacts)),
        "state": state,
    }
    try:
        write_atomically(path, json.dumps(unsent).encode(), sync=False)
    except OSError as error:
        logger.warning(
            "mlflow: %d entries are not kept, and lost if the process dies: %s", len(unsent["points"]), error
        )
        return False
    return True


def set_client_defaults() -> None:
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)


class Tracker:
    """The MLflow run of a training run. Calls return at once; only `flush` and `finish` wait, with a bound.

    `start` continues the run named in RUN/mlflow.json if there is one, so that resuming, evaluating, sampling
    and exporting all write to it. Trouble is a warning of this module's logger, once per outage.
    """

    def __init__(self, config: MetricsConfig | None = None, bound: int = 20_000):
        """bound: calls of `log` kept while the store cannot be reached; beyond it the oldest are dropped."""
        self.config, self.bound = config or MetricsConfig(), bound
        self._store: Store | None = None
        self._changed = threading.Condition()  # guards the queues, which only the thread shortens
        self._queue: deque[Entry] = deque()
        self._artifacts: deque[Artifact] = deque()
        self._next_upload = self._next_system_metrics = 0.0  # not before these times
        self._loaded: list[Path] = []  # files of unsent entries of earlier processes, now in the queue
        self._state: State | None = None  # to end the run with
        self._unsent_state: str | None = None  # with which an earlier process could not end it; None once it is sent
        self._ended = self._closing = self._down = self._uploads_down = False
        self._dropped = 0

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until the store has answered."""
        return self._store.run_id if self._store else None

    def start(
        self, run: Path, params: Mapping[str, Any], text: str, name: str, resume: str | None = None,
        enabled: bool = True, attach: bool = False,
    ) -> None:  # fmt: skip
        """Begin, or continue, the MLflow run of the folder `run`.

        params: flat configuration. text: the resolved configuration as YAML, kept as an artifact.
        name: shown in MLflow. resume: id of the MLflow run to continue, if not the one in the run folder.
        enabled: False makes every call do nothing (all ranks but one).
        attach: only add to the run that training owns: its state, parameters and system metrics stay alone.
        """
        if not enabled or self.config.tracking_uri == "none":
            return
        assert self._store is None, "a tracker is started once"
        set_client_defaults()
        self._run, self._text = Path(run), text
        uri = self.config.resolve(self._run)
        self._store = Store(uri, self.config.experiment, self._run, params, name, resume, attach, self.config.parent)
        self._thread = threading.Thread(target=self._work, args=(self._store,), name="msc-metrics", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at `step`; NaN and infinities are kept as such."""
        self._put(Entry({name: float(value) for name, value in values.items()}, step, int(time.time() * 1000)))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._put(Entry({name: str(value) for name, value in values.items()}, None, int(time.time() * 1000)))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, or all of a folder, into `folder` of the artifacts. It is read later: keep it."""
        self._put(Artifact(str(Path(path).resolve()), folder))

    def _put(self, item: Entry | Artifact) -> None:
        if self._store is not None and not self._closing:
            with self._changed:
                self._artifacts.append(item) if isinstance(item, Artifact) else self._queue.append(item)
                self._changed.notify_all()

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all is sent, at most `timeout` seconds; whether it was."""
        with self._changed:
            return self._store is None or self._changed.wait_for(lambda: not (self._queue or self._artifacts), timeout)

    def keep(self) -> None:
        """Write what is not yet sent to the run folder: called with every checkpoint, so that a run that is killed
        while the store is away, and goes on from there, loses nothing."""
        if self._store is None or self._closing:
            return
        with self._changed, contextlib.suppress(OSError):  # the folder may have become read-only
            live = RunFolder(self._run).unsent_metrics
            if not (self._queue or self._artifacts):
                live.unlink(missing_ok=True)
            elif not keep_unsent(self._run, self._queue, self._artifacts, path=live):
                return
            # Also the state in which an earlier process could not end the run: it goes on.
            for file in self._loaded:
                if file != live:
                    file.unlink(missing_ok=True)

    def finish(self, state: State, timeout: float | None = None) -> None:
        """Send what is left and end the run as `state`, within `timeout` seconds (30, for KILLED 5).

        What could not be sent stays in the run folder, for the next process of this run to send.
        """
        if self._store is None or self._closing:
            return
        with self._changed:
            self._state, self._closing = state, True
            self._changed.notify_all()
        self._thread.join(FINISH_TIMEOUT_S[state] if timeout is None else timeout)
        with self._changed:
            self._write_rest(self._store)
        if self._dropped:
            logger.warning("mlflow: %d oldest entries were dropped, more than %d waited", self._dropped, self.bound)

    # The thread that empties the queues -------------------------------------------------------------------

    def _work(self, store: Store) -> None:
        delay = 1.0
        self._load_unsent()
        if store.owns and self._loaded:
            self.keep()
        while True:
            try:
                self._send_all(store)
            except Exception as error:  # whatever it is, training must not notice
                if not self._down:
                    self._warn(store, "cannot be used now; metrics are kept and sent later", error)
                self._down = True
                with self._changed:
                    if self._closing:
                        return
                    self._drop_oldest()
                    self._changed.wait_for(lambda: self._closing, delay)
                delay = min(2 * delay, 30.0)
                continue
            if self._down:
                logger.warning("mlflow: %s is back; all that waited is sent", without_credentials(store.uri))
            delay, self._down = 1.0, False
            with self._changed:
                if self._closing and not self._queue and (self._ended or not store.owns):
                    return
                # At the latest for the next system metrics or attempt to upload.
                self._changed.wait_for(lambda: self._queue or self._closing or self._upload_is_due(), 1.0)

    def _send_all(self, store: Store) -> None:
        """Send everything that waits. Raises where the store cannot be reached."""
        if store.run_id is None:
            store.connect()
            if store.owns and self._text:
                name = "config.yaml" if store.starts == 1 else f"config-{store.starts}.yaml"
                self._artifacts.append(Artifact(name, text=self._text))
        if self._unsent_state and not store.owns:
            if store.was_running:
                store.end(self._unsent_state)
            self._unsent_state = None
        if self.config.system and store.owns and time.monotonic() >= self._next_system_metrics and not self._closing:
            self._next_system_metrics = time.monotonic() + SYSTEM_METRICS_S
            self._put(store.system_metrics())
        while self._queue:
            with self._changed:
                batch = list(itertools.islice(self._queue, BATCH))
            try:
                store.send(batch)
            except Exception as error:
                if not is_rejected(error):
                    raise
                self._warn(store, f"rejected {len(batch)} entries, which are dropped", error)
            self._remove(self._queue, len(batch))
        if self._closing and store.owns and not self._ended:  # before the artifacts: there may be only seconds
            store.end(str(self._end_state(store)))
            self._ended = True
        while self._upload_is_due():
            self._upload(store, self._artifacts[0])

    def _remove(self, queue: deque[Any], count: int) -> None:
        with self._changed:
            for _ in range(count):
                queue.popleft()
            self._changed.notify_all()  # for flush

    def _drop_oldest(self) -> None:
        while len(self._queue) > self.bound:
            self._queue.popleft()
            self._dropped += 1

    def _upload(self, store: Store, artifact: Artifact) -> None:
        """Try one artifact. Artifacts may have a store of their own: its trouble must not hold up metrics."""
        try:
            if artifact.text is not None or Path(artifact.path).exists():
                store.upload(artifact)
            else:
                logger.warning("mlflow: the artifact %s does not exist any more and was not sent", artifact.path)
        except Exception as error:
            if not is_rejected(error):
                if not self._uploads_down:
                    self._warn(store, f"does not take the artifact {artifact.path} now; it is sent later", error)
                self._uploads_down, self._next_upload = True, time.monotonic() + UPLOAD_RETRY_S
                return
            self._warn(store, f"rejected the artifact {artifact.path}", error)
        self._uploads_down = False
        self._remove(self._artifacts, 1)

    def _upload_is_due(self) -> bool:
        return bool(self._artifacts) and time.monotonic() >= self._next_upload

    def _warn(self, store: Store, problem: str, error: Exception) -> None:
        reason = without_credentials(store.uri, str(error)).strip().splitlines() or [""]
        uri = without_credentials(store.uri)
        logger.warning("mlflow: %s %s (%s: %.200s)", uri, problem, type(error).__name__, reason[0])

    # Entries that could not be sent in time ---------------------------------------------------------------

    def _end_state(self, store: Store) -> str | None:
        """In which the run still has to end; None where that is done, or the affair of the process that trains."""
        if self._ended:
            return None
        return self._state if not store.attach else self._unsent_state or (self._state if store.owns else None)

    def _write_rest(self, store: Store) -> None:
        self._drop_oldest()
        if (state := self._end_state(store)) or self._queue or self._artifacts:
            if not keep_unsent(self._run, self._queue, self._artifacts, state):
                return
            waiting = f"{len(self._queue)} entries" + (f" and the state {state}" if state else "")
            logger.warning("mlflow: %s wait in %s for the next command on this run", waiting, self._run)
        for file in (*self._loaded, RunFolder(self._run).unsent_metrics):
            file.unlink(missing_ok=True)

    def _load_unsent(self) -> None:
        for path in sorted(self._run.glob("mlflow-unsent-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                unsent = json.loads(path.read_text())
                entries, artifacts = [Entry(*p) for p in unsent["points"]], [Artifact(*f) for f in unsent["files"]]
                with self._changed:
                    self._queue.extendleft(reversed(entries))
                    self._artifacts.extendleft(reversed(artifacts))
                self._unsent_state = unsent["state"] or self._unsent_state
                self._loaded.append(path)
