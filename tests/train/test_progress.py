"""What a person sees: plain lines of fixed width, a live bar on a terminal, the time left, the banner."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from megadpo.config.schema import Config, DpoConfig
from megadpo.train.progress import ProgressLine, TimeLeft, print_banner
from megadpo.train.report import count_words, data_words, layout_words, loss_words, step_words

STEP = {
    "epoch": 0,
    "train/loss": 0.69314718,
    "train/rewards/accuracies": 0.5,
    "train/rewards/margins": -0.0123,
    "train/grad_norm": 12.345,
    "timing/train/tokens_per_s": 12345.6,
    "timing/train/pairs_per_s": 12.34,
    "timing/train/step_time_s": 2.0,
}
VALIDATION = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.25}


def plain() -> tuple[ProgressLine, io.StringIO]:
    output = io.StringIO()
    return ProgressLine(150, console=Console(file=output, force_terminal=False)), output


def terminal(total_steps: int = 150, *, start_step: int = 0) -> tuple[ProgressLine, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=160, _environ={"TERM": "xterm-256color"})
    return ProgressLine(total_steps, start_step=start_step, console=console), output


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_plain_line_per_step() -> None:
    progress, output = plain()
    progress.step(12, STEP)
    progress.step(13, STEP)
    progress.close()
    rest = "/150  loss   0.6931  acc 0.500  margin  -0.0123  grad  12.3450  tok/s     12,346  pairs/s   12.34  left "
    assert output.getvalue().splitlines() == [f"step  12{rest}0:04:36", f"step  13{rest}0:04:34"]


@pytest.mark.parametrize(
    "values",
    [
        {"train/loss": 251.25, "train/grad_norm": 0.001, "train/rewards/margins": 12.5},
        {"train/loss": 1e4, "train/grad_norm": 1e12, "train/rewards/margins": -1e7},
        {"train/loss": math.nan, "train/grad_norm": math.inf, "train/rewards/accuracies": 1.0},
        {"timing/train/tokens_per_s": 8e7, "timing/train/pairs_per_s": 9876.5},
        {"timing/train/tokens_per_s": 3.4, "timing/train/pairs_per_s": 0.01},
        {"train/rewards/accuracies": None, "train/rewards/margins": None, "train/grad_norm": None},
    ],
)
def test_lines_keep_their_columns_whatever_the_numbers(values: dict[str, float | None]) -> None:
    progress, output = plain()
    progress.step(1, STEP)
    progress.step(100, STEP | values)
    first, second = output.getvalue().splitlines()
    for word in ("loss", "acc", "margin", "grad", "tok/s", "pairs/s", "left"):
        assert first.index(word) == second.index(word), second


def test_numbers_that_are_not_there_are_dashes() -> None:
    """SFT without a reference has no rewards."""
    progress, output = plain()
    progress.step(1, {"train/loss": 251.25})
    shown = " ".join(output.getvalue().split())
    assert shown == "step 1/150 loss 251.2500 acc - margin - grad - tok/s - pairs/s - left -"


def test_a_validation_line() -> None:
    progress, output = plain()
    progress.validation(25, "helpful", VALIDATION, 12.34)
    assert output.getvalue() == "step  25/150  loss   0.5000  acc 0.750  margin   0.2500  validation helpful  12.3 s\n"


def test_a_plain_note_is_not_wrapped_or_marked_up() -> None:
    progress, output = plain()
    text = "[red] " + 100 * "word "
    progress.message(text)
    assert output.getvalue() == text + "\n"


def test_last_words_come_below_everything() -> None:
    progress, output = plain()
    progress.message_at_end("stopped")
    progress.message("saved")
    progress.close()
    progress.close()
    assert output.getvalue() == "saved\nstopped\n"


def test_ranks_that_are_not_told_to_show_are_silent() -> None:
    output = io.StringIO()
    for force_terminal in (False, True):
        console = Console(file=output, force_terminal=force_terminal)
        with ProgressLine(150, console=console, enabled=False) as progress:
            progress.step(1, STEP)
            progress.validation(1, "helpful", VALIDATION, 1.0)
            progress.message("note")
    assert output.getvalue() == ""


def test_a_live_bar_on_a_terminal() -> None:
    progress, output = terminal()
    with progress:
        progress.step(12, STEP)
        progress.step(13, STEP)
        drawn = output.getvalue()
    assert "\x1b[?25l" in drawn  # the cursor is hidden while the bar is live ...
    assert output.getvalue().endswith("\x1b[?25h")  # ... and given back
    text = without_escapes(drawn)
    assert "step 12/150" in text and "step 13/150" in text and "━" in text
    line = "loss   0.6931  acc 0.500  margin  -0.0123  grad  12.3450  tok/s     12,346  pairs/s   12.34  left 0:04:34"
    assert line in text


def test_notes_and_validation_lines_stand_above_the_bar() -> None:
    progress, output = terminal()
    with progress:
        progress.step(25, STEP)
        progress.validation(25, "helpful", VALIDATION, 12.34)
        progress.message("[red] saved")
    lines = [line.rstrip() for line in without_escapes(output.getvalue()).replace("\r", "\n").split("\n")]
    assert "step  25/150  loss   0.5000  acc 0.750  margin   0.2500  validation helpful  12.3 s" in lines
    assert "[red] saved" in lines
    assert lines.index("[red] saved") < max(i for i, line in enumerate(lines) if line.startswith("step 25/150 ━"))


def test_a_resumed_run_starts_where_it_was() -> None:
    progress, output = terminal(150, start_step=100)
    progress.close()
    assert "step 100/150" in without_escapes(output.getvalue())


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, _environ={"TERM": "dumb"})
    with ProgressLine(150, console=console) as progress:
        progress.step(12, STEP)
    assert output.getvalue().startswith("step  12/150  loss") and "\x1b" not in output.getvalue()


def test_a_pipe_gets_plain_lines_even_where_the_environment_forces_colour() -> None:
    """CI systems set FORCE_COLOR, which rich by itself takes for a terminal."""
    program = (
        "from megadpo.train.progress import ProgressLine\nwith ProgressLine(3) as p: p.step(1, {'train/loss': 0.5})"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"FORCE_COLOR": "1", "PYTHONPATH": ":".join(p for p in sys.path if p), "TERM": "xterm"},
    )
    assert found.stdout.startswith("step 1/3  loss   0.5000") and "\x1b" not in found.stdout


def test_the_time_left_is_the_mean_of_the_last_20_steps() -> None:
    left = TimeLeft(100)
    assert left.after(0) is None
    for seconds in [5.0] * 10 + [1.0] * 10 + [2.0] * 10:
        left.add(seconds)
    assert left.after(30) == pytest.approx(70 * 1.5)
    assert left.after(100) == 0


def test_the_slow_first_step_counts_only_until_there_is_another() -> None:
    left = TimeLeft(100)
    left.add(60.0)
    assert left.after(1) == 99 * 60
    left.add(1.0)
    assert left.after(2) == 98
    left.add(3.0)
    assert left.after(3) == 97 * 2


def test_a_long_run_shows_days() -> None:
    progress, output = plain()
    progress.step(1, STEP | {"timing/train/step_time_s": 3600.0})
    assert output.getvalue().rstrip().endswith("left 6d 05:00:00")


def test_the_banner_says_what_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_banner([("model", "models/Llama-3.1-8B"), ("checkpoints", "none"), ("note", "12 pairs were dropped")])
    assert (
        capsys.readouterr().out
        == """\
megadpo
  model        models/Llama-3.1-8B
  checkpoints  none
  note         12 pairs were dropped
"""
    )


def test_the_words_of_the_banner() -> None:
    assert layout_words({"TP": 4, "PP": 2, "CP": 1, "DP": 2}, 16) == "TP 4 x PP 2 x DP 2 (16 ranks)"
    assert layout_words({"TP": 1, "PP": 1}, 1) == "1 rank"
    assert [count_words(count) for count in (8_030_261_248, 512)] == ["8,030,261,248 (8.03 B)", "512"]
    assert [step_words(1500, start) for start in (0, 500)] == ["1,500", "1,500, resuming after step 500"]
    assert data_words(24, {}) == "24 training pairs"
    words = "192,000 training pairs, 1,024 in validation set helpful, 512 in validation set harmless"
    assert data_words(192_000, {"helpful": 1024, "harmless": 512}) == words


def test_the_banner_names_what_changes_the_loss() -> None:
    def words_of(dpo: DpoConfig) -> str:
        return loss_words(cast(Config, SimpleNamespace(dpo=dpo)))

    assert words_of(DpoConfig()) == "sigmoid, beta 0.05"
    simpo = DpoConfig(
        loss_type="simpo", loss_options={"simpo_gamma": 1.4}, preference_average_log_probs=True, sft_loss_weight=0.5
    )
    words = "simpo, beta 0.05, simpo_gamma 1.4, means over tokens, weights: preference 1, sft 0.5"
    assert words_of(simpo) == words
