"""Runs in MLflow, beside TensorBoard: settings, curves as they grow, scores, pictures, and where the model lies.

MLflow finds its server and experiment by its own variables (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` ...).
Whatever becomes of it while a job runs, the job goes on.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioner import storage
from captioner.errors import ConfigError, OutOfReachError
from captioner.training.publish import history_so_far

logger = logging.getLogger(__name__)

# Runs by their keys, in the work of an unfinished output.
FILE = "mlflow.json"
# Parameters and metrics of one request, by MLflow's own limits.
_PARAMETERS, _METRICS = 100, 1000
_EXPERIMENT = "captioner"
# Between two looks at how far a run has come.
FOLLOW_SECONDS = 10.0


class Tracker:
    """The runs of one job in MLflow; of a job that nobody follows, none.

    A job that is continued goes on with its runs.
    """

    def __init__(self, track: str | None, work: str):
        """
        Args:
            track: ``mlflow``, or None.
            work: folder for what only the job needs (URI).

        Raises:
            ConfigError: MLflow is not installed, or cannot be used as it is set up.
            OutOfReachError: its server cannot be had.
        """
        self._client: Any = None
        if track is None:
            return
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ConfigError("track: MLflow is not installed: pip install mlflow-skinny") from None
        # It would print where each run can be looked at.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self._place = storage.join(work, FILE)
        self._logged: dict[str, int] = {}
        self._begun: set[str] = set()
        self._failing: set[str] = set()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        try:
            client = MlflowClient()
            found = client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else client.create_experiment(name)
        except Exception as error:  # its stores are plugins, each with errors of its own
            where = os.environ.get("MLFLOW_TRACKING_URI", "its default place")
            kind = OutOfReachError if where.startswith(("http://", "https://")) else ConfigError
            raise kind(f"track: MLflow at {where}: {_said(error)}") from error
        self._client = client
        self._runs: dict[str, str] = (
            storage.read_json(self._place) if storage.exists(self._place) else {}
        )

    @property
    def follows(self) -> bool:
        """Whether there is anything to be told."""
        return self._client is not None

    def begin(
        self, key: str, name: str, settings: Mapping[str, Any], parent: str | None = None
    ) -> None:
        """Begin a run, or go on with it.

        Args:
            key: of the run within the job.
            settings: nested ones too.
            parent: key of the run it belongs to.
        """
        with self._told(key):
            if self._client is None:
                return
            if key in self._begun:
                return
            self._begun.add(key)
            if key in self._runs:
                self._client.update_run(self._runs[key], status="RUNNING")
                return
            tags = {} if parent is None else {"mlflow.parentRunId": self._runs[parent]}
            run = self._client.create_run(self._experiment, run_name=name, tags=tags)
            self._runs[key] = run.info.run_id
            storage.write_bytes(self._place, json.dumps(self._runs).encode())
            from mlflow.entities import Param

            flat = [Param(name, str(value)) for name, value in _flat(settings)]
            for start in range(0, len(flat), _PARAMETERS):
                self._client.log_batch(run.info.run_id, params=flat[start : start + _PARAMETERS])

    def follow(self, key: str, root: str) -> None:
        """Add the epochs of a run that are not there yet.

        Args:
            root: the model's directory.
        """
        with self._told(key):
            if self._client is None or key not in self._runs:
                return
            history = history_so_far(root)
            from mlflow.entities import Metric

            now = int(1000 * time.time())
            new = history[self._logged.get(key, 0) :]
            found = [
                Metric(name, float(value), now, record.epoch)
                for record in new
                for name, value in record.model_dump(exclude={"epoch"}, exclude_none=True).items()
            ]
            for start in range(0, len(found), _METRICS):
                self._client.log_batch(self._runs[key], metrics=found[start : start + _METRICS])
            self._logged[key] = len(history)

    def end(
        self,
        key: str,
        status: str = "FINISHED",
        *,
        scores: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """End a run.

        Args:
            status: FINISHED, FAILED or KILLED.
            pictures: PNG files by name.
        """
        with self._told(key):
            if self._client is None or key not in self._runs:
                return
            run = self._runs[key]
            for name, value in (scores or {}).items():
                self._client.log_metric(run, name, value)
            for name, text in (tags or {}).items():
                self._client.set_tag(run, name, text)
            with tempfile.TemporaryDirectory() as folder:
                for name, data in (pictures or {}).items():
                    path = Path(folder, name)
                    path.write_bytes(data)
                    self._client.log_artifact(run, str(path))
            self._client.set_terminated(run, status)

    @contextmanager
    def ended_with(self, key: str) -> Iterator[None]:
        """End a run as FAILED or KILLED where the block does."""
        try:
            yield
        except KeyboardInterrupt:
            self.end(key, "KILLED")
            raise
        except BaseException:
            self.end(key, "FAILED")
            raise

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        if self._client is None:
            yield
            return
        try:
            yield
        except Exception as error:  # a store's, a full disk's, ours: none is worth a training
            if key not in self._failing:  # or an outage would be told of every few seconds
                logger.warning("MLflow: %s", _said(error))
            self._failing.add(key)
        else:
            self._failing.discard(key)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
