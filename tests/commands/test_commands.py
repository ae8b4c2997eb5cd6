"""The command line itself: every file of megadpo/commands is listed, and what doesn't need torch doesn't import it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megadpo import commands
from megadpo.commands import main, overview
from megadpo.config.shipped import shipped_configs
from tests.helpers.distributed import REPOSITORY
from tests.test_layers import TOO_HEAVY

FOLDER = REPOSITORY / "megadpo" / "commands"
NAMES = sorted(path.stem.rstrip("_") for path in FOLDER.glob("[!_]*.py"))


def test_every_command_is_listed_with_a_line() -> None:
    lines = [line.split(maxsplit=1) for line in overview().splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == NAMES and len(NAMES) >= 13
    assert all(len(summary) > 15 and "megadpo" not in summary for _, summary in lines)
    assert str(REPOSITORY / "configs") in overview()


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_of_a_command_begins_with_its_call(name: str) -> None:
    module = next(path.stem for path in FOLDER.glob("*.py") if path.stem.rstrip("_") == name)
    first = (importlib.import_module(f"megadpo.commands.{module}").__doc__ or "").splitlines()[0]
    assert f": megadpo {name} " in first


def imported(*arguments: str) -> tuple[int, list[str], str]:
    """Exit code, heavy modules that were imported, and stderr."""
    code = (
        "import sys\n"
        "from megadpo.commands import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        f"print('heavy:', *sorted({TOO_HEAVY!r} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, text=True, capture_output=True)
    return done.returncode, done.stdout.splitlines()[-1].split()[1:], done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"], ["keys", "beta"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(*arguments) == (0, [], "")


@pytest.mark.parametrize("command", ["train", "check", "evaluate"])
def test_a_config_that_is_refused_is_refused_at_once(command: str) -> None:
    code, heavy, error = imported(command, "dpo_megatron", "dpo.seed=x", "policy.no_such_key=1")
    assert (code, heavy) == (2, []) and error.startswith("refused, 2 problem(s):\n")


@pytest.mark.parametrize("command", ["train", "check", "evaluate", "profile"])
def test_an_abbreviated_option_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher, which takes torchrun's options out, would not know it: one rank would train."""
    required = ["--out", "profile.png"] if command == "profile" else []
    with pytest.raises(SystemExit) as end:
        main([command, "demo", *required, "--nproc", "8"])
    assert end.value.code == 2 and "unrecognized arguments: --nproc" in capsys.readouterr().err


def test_an_unknown_command_and_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chek"]) == 2
    assert "no command 'chek'; did you mean check?" in capsys.readouterr().err
    assert main(["check", "dpo_megatrn"]) == 2
    said = capsys.readouterr().err
    assert "dpo_megatrn" in said and all(name in said for name in shipped_configs())


def test_a_shipped_config_by_name_is_the_file_and_can_be_inherited(tmp_path: Path) -> None:
    from megadpo.config import load_config

    named = load_config("dpo_megatron")
    assert named == load_config(REPOSITORY / "configs/dpo_megatron.yaml")
    (tmp_path / "mine.yaml").write_text("defaults: dpo_megatron\ndpo: {seed: 7}\n")
    assert load_config(tmp_path / "mine.yaml").dpo.seed == 7
    (tmp_path / "simpo.yaml").write_text("defaults: [dpo_megatron, losses/simpo]\n")
    assert load_config(tmp_path / "simpo.yaml").dpo.loss_type == "simpo"
    beside = tmp_path / "dpo_megatron"
    beside.write_text("defaults: dpo_megatron.yaml\n")
    (tmp_path / "dpo_megatron.yaml").write_text((REPOSITORY / "configs/demo_sft.yaml").read_text())
    assert load_config(beside).dpo.seed == 1  # a file there is meant before a name


def test_ctrl_c_ends_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megadpo.commands.keys.main", interrupted)
    assert commands.main(["keys"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
