"""`megadpo inspect`: what it shows, plainly and in colour, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megadpo.commands import inspect, main
from tests.helpers.runs import make_config, make_model, ranked_pairs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model folder holds no weights."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model(folder / "model")
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    return make_config(folder, model)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_run_at_a_glance(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, config, "--world-size", 2, "--batches", 3)
    assert f"{config.parent / 'train.jsonl'}: 40 rows, 40 pairs; as plain text" in out
    assert re.search(r"shared prompts save \d+\.\d% of the tokens; chosen is longer than rejected in \d+\.\d%", out)
    assert "Global batches of 8 pairs: packs of at most 200 tokens, 2 data-parallel rank(s)" in out
    assert len(re.findall(r"^\d+ +8 +\d+ +\d+ +\d+\.\d% +\d+\.\d%$", out, re.MULTILINE)) == 3
    assert "3 of the epoch's 5 batches" in out
    assert "\x1b" not in out, "plain where it is no terminal"


def test_a_pair_token_by_token(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads((config.parent / "train.jsonl").read_text().splitlines()[3])
    out = shown(capsys, config, "--pair", 3)
    assert f"Pair 3 ({config.parent / 'train.jsonl'}:4)" in out
    prompt, chosen, rejected = re.split(r"(?:prompt|chosen|rejected): \[.*\n", out.split("Pair 3 ")[1])[1:]
    for text, given in ((prompt, row["prompt"]), (chosen, f"«{row['chosen']}</s>»")):
        lines = [re.sub(r"^ +\d+  ", "", line) for line in text.splitlines()]
        assert "".join(lines).replace("|", "").replace("»«", "") == given
    assert re.match(r" +\d+  «", rejected) and "rejected: [" in out and "tokens in the loss" in out
    positions = [int(line.split()[0]) for line in chosen.splitlines() if line.strip()]
    assert positions[0] == int(re.search(r"prompt: \[0, (\d+)\)", out)[1])  # type: ignore[index]


def test_what_groups_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three answers to each of four prompts: the prompts once instead of three times, the answers once instead of twice."""
    path = ranked_pairs(tmp_path / "ranked.jsonl", prompts=4, answers=3, seed=0)
    config = make_config(tmp_path, make_model(tmp_path / "model"), data={"train_data_path": str(path)})
    assert main(["inspect", str(config), "--batches", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"groups: 12 pairs of 12 answers to 4 prompts, computed once each: ([\d,]+) tokens, .* take ([\d,]+)", out
    )
    assert found, out
    tokens, alone = (int(number.replace(",", "")) for number in found.groups())
    assert 2 * tokens < alone < 3 * tokens and "begin alike" not in out
    assert main(["inspect", str(config), "--batches", "1", "data.group_prompts=false"]) == 0
    assert "groups:" not in capsys.readouterr().out


def test_what_answers_that_begin_alike_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ranked_pairs(tmp_path / "ranked.jsonl", prompts=4, answers=2, seed=0, begin=16)
    policy = {"max_total_sequence_length": 128, "train_global_batch_size": 4}
    config = make_config(tmp_path, make_model(tmp_path / "model"), data={"train_data_path": str(path)}, policy=policy)
    out = " ".join(shown(capsys, config, "--batches", 1).split())
    found = re.search(r"once each: ([\d,]+) tokens, .* take ([\d,]+) .* begin alike: ([\d,]+) tokens less \(", out)
    assert found, out
    tokens, alone, less = (int(number.replace(",", "")) for number in found.groups())
    assert tokens + less == alone and less >= 4 * 32  # no two pairs share anything else


def test_without_shared_prompts_and_without_packing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, config, "policy.sequence_packing.enabled=false")
    assert "2 pairs a micro-batch" in out and "sharing prompts would save" in out
    assert "prompt + chosen: [0, " in out and "prompt + rejected: [" in out


def test_long_segments_are_cut_unless_asked_for(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "the " * 450, "chosen": " a\nb\x1b[2J", "rejected": " no"}) + "\n")
    longer = ["policy.max_total_sequence_length=1000", "policy.sequence_packing.train_mb_tokens=2000"]
    longer += ["policy.train_global_batch_size=1", f"data.train_data_path={path}"]
    longer.append(f"policy.model_name={_longer_model(config, tmp_path)}")
    out = shown(capsys, config, *longer)
    assert "tokens more: --all-tokens" in out and "\x1b" not in out and r"\x1b" in out and r"\n" in out
    assert "tokens more" not in shown(capsys, config, *longer, "--all-tokens")


def _longer_model(config: Path, folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    for file in (config.parent / "model").iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 4096}))
    return model


def test_a_validation_set_comes_in_file_order_and_whole(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, config, "--set", "held_out")
    assert "valid.jsonl: 11 rows, 11 pairs" in out and "held_out" not in out
    assert "one of train, held_out" in refused(capsys, config, "--set", "other")
    assert "4 of 40 prompts" in shown(capsys, config, "--set", "holdout", "data.holdout=0.1", "data.val_data_paths=null")


def test_refusals_name_what_is_wrong(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--pair: got 40; expected a row of" in refused(capsys, config, "--pair", 40)
    assert "data.train_data_path: got" in refused(capsys, config, "data.train_data_path=")
    assert "train_global_batch_size" in refused(capsys, config, "--world-size", 16)
    assert "nowhere.jsonl: got 'No such file" in refused(capsys, config, "data.train_data_path=nowhere.jsonl")


def test_it_needs_no_megatron(config: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from megadpo.commands import main\n"
        f"assert main(['inspect', {str(config)!r}]) == 0\n"
        "print('megatron.core' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")


def test_on_a_terminal_answers_are_in_colour(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=100)
    inspect.show(inspect.parse([str(config)]), console)
    assert "\x1b[1;32m" in screen.getvalue() and "\x1b[1;31m" in screen.getvalue() and "«" not in screen.getvalue()
