"""What a run writes about itself: metrics.jsonl always, TensorBoard and Weights & Biases where the config asks.

<log_dir>/metrics.jsonl                          one JSON object per call of `log`
<log_dir>/metrics.superseded-<UTC time>.jsonl    lines that a resumed run does again (see `set_aside_later_lines`)
<log_dir>/tensorboard/                           event files (`logger.tensorboard.log_dir` names another folder)
<log_dir>/wandb/, <log_dir>/wandb_run_id         the run's files and the id under which a resumed run goes on
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import LoggerConfig

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_ID_FILE = "wandb_run_id"

Number = int | float | None

LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """One place that metrics go to. `log` and `close` raise what the disk or the client raises."""

    def log(self, step: int, metrics: Mapping[str, Number]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class MetricsLogger:
    """Sends the metrics of a step to metrics.jsonl, TensorBoard and wandb, on the one rank that writes.

    cfg: the config's `logger` section.
    enabled: whether this rank writes; on the others `log` and `close` do nothing.
    resumed_step: the last step that the loaded checkpoint contains; 0 for a run that starts from nothing. What an
        earlier process logged after that step is taken out of metrics.jsonl (and kept in a file beside it), so that
        the curve has each step once.
    run_config: the resolved config, for wandb's table of runs.

    Raises ConfigError, on EVERY rank and before anything is written, where a client that the config enables is not
    installed; on the writing rank also where log_dir can't be written or wandb refuses to start. `log` raises OSError
    when the disk fails: a run whose curve is lost should end, not go on unseen.
    """

    def __init__(
        self,
        cfg: LoggerConfig,
        *,
        enabled: bool = True,
        resumed_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        problems = missing_clients(cfg)
        if problems:
            raise ConfigError(problems)
        self._sinks: list[Sink] = []
        self._last_step = resumed_step
        if not enabled:
            return
        try:
            self._open_sinks(cfg, resumed_step, run_config)
        except OSError as error:
            self.close(exit_code=1)
            raise ConfigError(
                Problem("logger.log_dir", cfg.log_dir, "a folder that can be written", f"choose another ({error})")
            ) from error
        except ConfigError:
            self.close(exit_code=1)
            raise

    def _open_sinks(self, cfg: LoggerConfig, resumed_step: int, run_config: Mapping[str, Any] | None) -> None:
        log_dir = Path(cfg.log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        self._sinks.append(JsonLines(log_dir / METRICS_FILE, resumed_step=resumed_step))
        if cfg.tensorboard_enabled:
            folder = log_dir / (cfg.tensorboard.log_dir or "tensorboard")
            self._sinks.append(TensorBoard(folder, resumed_step=resumed_step))
        if cfg.wandb_enabled:
            self._sinks.append(Wandb(cfg, resumed_step=resumed_step, run_config=run_config))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step: numbers (Python's, numpy's or 0-d tensors) or None, under their full names.

        A step has one line, so its validation metrics go into the same call. Steps never go backwards (ValueError).
        Raises TypeError for a value that is no number, OSError when the disk fails.
        """
        if not self._sinks:
            return
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: metrics are logged in order")
        self._last_step = step
        numbers = {name: plain_number(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(step, numbers)

    def close(self, exit_code: int = 0) -> None:
        """Finish all files; wandb shows a run with another exit code than 0 as failed. A second call does nothing."""
        sinks, self._sinks = self._sinks, []
        errors: list[Exception] = []
        for sink in sinks:
            try:
                sink.close(exit_code)
            except Exception as error:  # the other sinks must still be closed; the first error goes on below
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(exit_code=0 if error is None else 1)
        except Exception as closing_error:
            if error is None:
                raise
            # What ended the run is the error to show; one while closing is often its echo (the same full disk).
            LOG.warning("closing the metric files failed too: %s", closing_error)


class JsonLines:
    """metrics.jsonl: {"step": 12, "epoch": 0, "train/loss": 0.69, ...} per line, in the file before `log` returns."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        set_aside_later_lines(path, resumed_step=resumed_step)
        # Unbuffered: a line that was logged survives the process, and a full disk is noticed at its own line.
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        # JSON has no nan and no infinity: null keeps the file readable for every parser.
        finite = {n: None if v is None or not math.isfinite(v) else v for n, v in metrics.items()}
        rest = memoryview(json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n")
        while rest:  # a raw write may stop short on a nearly full disk; the next one then raises
            rest = rest[self._file.write(rest) :]

    def close(self, exit_code: int) -> None:
        self._file.close()


class TensorBoard:
    """Event files. On a resumed run `purge_step` makes TensorBoard hide what an earlier process wrote after it."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # 0 as well: a run that starts from nothing hides an older run in the same folder.
        purge_step = resumed_step + 1 if resumed_step else 0
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()  # waits for the writing thread, which keeps its error for us to see

    def close(self, exit_code: int) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run; online or offline as `logger.wandb.mode` or else the environment's WANDB_MODE says.

    A resumed run goes on under the same id. wandb keeps the first value logged for a step, so steps done again change
    nothing there. The client buffers: a process killed outright (SIGKILL) loses its last rows here, never in
    metrics.jsonl.
    """

    def __init__(self, cfg: LoggerConfig, *, resumed_step: int, run_config: Mapping[str, Any] | None) -> None:
        import wandb

        id_file = Path(cfg.log_dir) / WANDB_RUN_ID_FILE
        known_id = id_file.read_text().strip() if resumed_step and id_file.exists() else None
        options = {name: value for name, value in dataclasses.asdict(cfg.wandb).items() if value is not None}
        try:
            self._run = wandb.init(
                id=known_id or None,
                resume="allow",
                dir=cfg.log_dir,
                config=None if run_config is None else dict(run_config),
                **options,
            )
        except wandb.errors.UsageError as error:  # no API key, or a name that wandb does not take
            raise ConfigError(
                Problem(
                    "logger.wandb",
                    options,
                    "settings with which wandb starts",
                    f"`wandb login`, or logger.wandb.mode: offline, or logger.wandb_enabled: false ({error})",
                )
            ) from error
        id_file.write_text(self._run.id + "\n")

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def missing_clients(cfg: LoggerConfig) -> list[Problem]:
    """A Problem for each client that the config enables and this Python doesn't have. Imports none of them."""
    wanted = {"wandb": cfg.wandb_enabled, "tensorboard": cfg.tensorboard_enabled}
    return [
        Problem(
            f"logger.{package}_enabled",
            True,
            f"the Python package {package}, which is not installed",
            f"`pip install {package}`, or logger.{package}_enabled: false",
        )
        for package, enabled in wanted.items()
        if enabled and not _is_installed(package)
    ]


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory (wandb writes ./wandb by default) is found too, without an origin.
    return spec is not None and spec.origin is not None


def plain_number(name: str, value: Any) -> Number:
    """A Python int or float (or None) from any scalar; raises TypeError for anything else."""
    if hasattr(value, "item"):  # numpy scalars, 0-d arrays and tensors, without importing either library
        value = value.item()
    if isinstance(value, bool) or (value is not None and not isinstance(value, int | float)):
        raise TypeError(f"metric {name}: expected a number; got {value!r}")
    return value


def set_aside_later_lines(path: Path, *, resumed_step: int) -> Path | None:
    """Move the lines of steps after `resumed_step` (0: all lines) from a metrics.jsonl into a file beside it.

    They are there when a run was killed after its last checkpoint: the resumed run does those steps again. A line that
    is not a JSON object with a step, such as a last one cut short, is moved too. Both files are written aside and
    renamed, the moved lines first, so that no moment exists at which a line is in neither.

    Returns the file with the moved lines; None, and nothing is touched, where there are none. Raises OSError.
    """
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    is_kept = [_is_kept(line, resumed_step) for line in lines]
    kept = [line for line, keep in zip(lines, is_kept, strict=True) if keep]
    moved = [line for line, keep in zip(lines, is_kept, strict=True) if not keep]
    aside = None
    if moved:
        aside = _unused_path(path)
        _write_whole(aside, moved)
    if moved or (kept and not kept[-1].endswith(b"\n")):
        _write_whole(path, kept)
    return aside


def _is_kept(line: bytes, resumed_step: int) -> bool:
    if resumed_step == 0:
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    step = record.get("step") if isinstance(record, dict) else None
    return isinstance(step, int) and step <= resumed_step


def _unused_path(path: Path) -> Path:
    """metrics.superseded-20260131T235959Z.jsonl, with -2, -3, ... where that exists."""
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        candidate = path.with_name(f"{path.stem}.superseded-{now}{suffix}{path.suffix}")
        if not candidate.exists():
            return candidate
        number += 1


def _write_whole(path: Path, lines: list[bytes]) -> None:
    """The file holds all lines or is as it was; each line ends with a newline."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for line in lines:
            file.write(line if line.endswith(b"\n") else line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
