"""Prints the progress of a run: a banner, a line per step, a line per validation set. Rank 0 only.

In a terminal the step's line is a live bar at the bottom. In a file or pipe every step prints one line of fixed width:

  step 12/80  loss   0.6931  acc 0.500  margin  -0.0123  grad  12.3450  tok/s     12,346  pairs/s   12.34  left 0:04:36
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megadpo.launcher import last_words

WINDOW_STEPS = 20
"""Steps whose mean duration gives the time left."""

Metrics = Mapping[str, float | int | None]


class ProgressLine:
    """Prints each finished step. With `enabled=False` it does nothing.

    total_steps: of the whole run, including those before a resume.
    start_step: the last step of the loaded checkpoint; 0 for a new run.
    console: where to print; default: stdout, with a live bar if that is a terminal.

    Use it as a context manager, or call `close`, to restore the terminal's cursor.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, console: Console | None = None, enabled: bool = True
    ) -> None:
        self._total_steps = total_steps
        self._time_left = TimeLeft(total_steps)
        self._console = console or _stdout_console()
        self._enabled = enabled
        self._last_text: str | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._console,
                auto_refresh=False,  # drawn after each step, not by a thread ten times a second
            )
            self._task = self._bar.add_task("steps", total=total_steps, completed=start_step, line="")
            self._bar.start()

    def step(self, step: int, metrics: Metrics) -> None:
        """Prints a finished step.

        metrics: names as in metrics.jsonl. It prints train/loss, train/rewards/accuracies, train/rewards/margins,
            train/grad_norm, timing/train/{tokens_per_s,pairs_per_s,step_time_s}; "-" for missing or None.
        """
        if not self._enabled:
            return
        self._time_left.add(metrics.get("timing/train/step_time_s"))
        fields = _quality(metrics, "train/")
        fields += [
            f"grad {_number(metrics.get('train/grad_norm'), 8)}",
            f"tok/s {_rate(metrics.get('timing/train/tokens_per_s'), '10,.0f')}",
            f"pairs/s {_rate(metrics.get('timing/train/pairs_per_s'), '7.2f')}",
            f"left {_duration(self._time_left.after(step))}",
        ]
        line = "  ".join(fields)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, line=line, refresh=True)
        else:
            self.message(f"{self._step_of_total(step)}  {line}")

    def validation(self, step: int, name: str, metrics: Metrics, seconds: float) -> None:
        """Prints the result of one validation set. metrics: names without a prefix, such as rewards/margins."""
        fields = _quality(metrics, "")
        self.message(f"{self._step_of_total(step)}  {'  '.join(fields)}  validation {name}  {seconds:.1f} s")

    def message_at_end(self, text: str) -> None:
        """Prints `text` when this is closed, below everything."""
        self._last_text = text

    def message(self, text: str) -> None:
        """Prints one or more lines of text; above the live bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            # Not by rich, which wraps at 80 columns without a terminal
            print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        """Ends the live bar and prints the last text. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        if self._enabled and self._last_text is not None:
            last_words(self._last_text, self._console.file)
            self._last_text = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step_of_total(self, step: int) -> str:
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"


class TimeLeft:
    """Seconds to the last step, from the mean duration of the last `WINDOW_STEPS` steps.

    The first step of a process also compiles and allocates, so it counts only until there is another. Time for validation
    and checkpoints is not included.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._durations_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._steps_seen = 0

    def add(self, step_time_s: float | None) -> None:
        """Adds a finished step. None: its duration is not known."""
        if step_time_s is None or not math.isfinite(step_time_s):
            return
        self._steps_seen += 1
        if self._steps_seen == 2:
            self._durations_s.clear()
        self._durations_s.append(step_time_s)

    def after(self, step: int) -> float | None:
        """Seconds left after `step`; None before the first duration."""
        if not self._durations_s:
            return None
        return max(self._total_steps - step, 0) * sum(self._durations_s) / len(self._durations_s)


def print_banner(rows: Sequence[tuple[str, str]]) -> None:
    """Prints (name, value) rows as plain text on stdout."""
    width = max(len(name) for name, _ in rows)
    lines = ["megadpo", *(f"  {name:<{width}}  {value}" for name, value in rows)]
    print("\n".join(lines), flush=True)


def _stdout_console() -> Console:
    # Many CI systems set FORCE_COLOR; rich would then treat their logs as a terminal and write escape codes
    return Console(file=sys.stdout, force_terminal=sys.stdout.isatty())


def _quality(metrics: Metrics, prefix: str) -> list[str]:
    accuracy = metrics.get(f"{prefix}rewards/accuracies")
    return [
        f"loss {_number(metrics.get(f'{prefix}loss'), 8)}",
        f"acc {_missing(5) if accuracy is None else f'{accuracy:5.3f}'}",
        f"margin {_number(metrics.get(f'{prefix}rewards/margins'), 8)}",
    ]


def _number(value: float | None, width: int) -> str:
    """Right-aligned, with up to 4 decimals; in scientific notation if it is too long."""
    if value is None:
        return _missing(width)
    for decimals in (4, 3, 2, 1):
        text = f"{value:.{decimals}f}"
        if len(text) <= width:
            return f"{text:>{width}}"
    return f"{value:>{width}.1e}"


def _rate(value: float | None, spec: str) -> str:
    return _missing(len(format(0.0, spec))) if value is None else format(value, spec)


def _missing(width: int) -> str:
    return f"{'-':>{width}}"


def _duration(seconds: float | None) -> str:
    """h:mm:ss, with days before it if there are any."""
    if seconds is None:
        return _missing(7)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}:{rest:02}" if days else f"{hours}:{minutes:02}:{rest:02}"
