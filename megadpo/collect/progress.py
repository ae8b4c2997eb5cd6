"""Shows the progress of a collection: a live bar in a terminal, a line every 30 s in a file or pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0
"""Seconds between lines if stdout is not a terminal."""
_SPEED_OVER_S = 60.0


class CollectProgress:
    """Counts rollouts and shows the progress. Use it as a context manager, to restore the terminal's cursor.

    total: all rollouts. done, reward_sum: number and sum of rewards of those from earlier runs."""

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        reward_sum: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = done
        self.failed = 0
        self.retries = 0
        self._reward_sum = reward_sum
        self._clock = clock
        self._start = self._last_line = clock()
        self._done_before = done
        self._last_reason: float | None = None
        # CI systems set FORCE_COLOR; rich would then treat their logs as a terminal and write escape codes
        self._console = console or Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("Collecting rollouts"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=_SPEED_OVER_S,
            )
            self._task = self._bar.add_task("", total=total, completed=done, line=self._line())

    @property
    def mean_reward(self) -> float | None:
        """Mean over all finished rollouts; None before the first."""
        return self._reward_sum / self.done if self.done else None

    def finished(self, reward: float) -> None:
        """Counts a finished rollout."""
        self.done += 1
        self._reward_sum += reward
        self._show()

    def failure(self) -> None:
        """Counts a failed rollout."""
        self.failed += 1
        self._show()

    def retry(self, reason: str) -> None:
        """Counts a retry. The reason is shown every 30 s at most, because an outage causes thousands of retries."""
        self.retries += 1
        now = self._clock()
        if self._last_reason is None or now - self._last_reason >= LINE_EVERY_S:
            self._last_reason = now
            self.message(f"retrying: {reason}")
        self._show()

    def message(self, text: str) -> None:
        """Prints a line; above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def __enter__(self) -> CollectProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self._line())
        elif self._clock() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = self._clock()
        percent = 100 * self.done // self.total if self.total else 100
        self.message(f"Collecting rollouts: {percent:3d}%  {self.done:,}/{self.total:,}  {self._line()}")

    def _line(self) -> str:
        seconds = self._clock() - self._start
        rate = (self.done - self._done_before) / seconds if seconds > 0 else 0.0
        mean = "-" if self.mean_reward is None else f"{self.mean_reward:.4f}"
        fields = [f"reward {mean}", f"{rate:.2f}/s"]
        fields += [f"failed {self.failed:,}"] if self.failed else []
        fields += [f"retries {self.retries:,}"] if self.retries else []
        return "  ".join(fields)
