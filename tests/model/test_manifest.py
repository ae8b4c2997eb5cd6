"""Damage of any file of a checkpoint is seen, and named, by everything that reads it: never trained on, never exported."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megadpo.commands import main
from megadpo.config.problems import ConfigError, Problem
from megadpo.model import manifest as manifest_module
from megadpo.model.manifest import damages, read_manifest, verify, write_manifest
from megadpo.model.source import resolve_source
from megadpo.model.weights import dist_folder, export_hf, import_hf
from megadpo.model.weights.safe_files import read_metadata
from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import TP2
from tests.helpers.runs import evaluate, make_config, make_model, read_metrics, train, train_and_read


def flip(content: bytes, bits: int) -> bytes:
    changed = bytearray(content)
    for place in random.Random(len(content)).sample(range(8 * len(content)), bits):
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: flip(content, 1),
    "64 bits": lambda content: flip(content, 64),
    "zeros": lambda content: bytes(len(content)),
    "gone": lambda content: None,
}


@contextlib.contextmanager
def damaged(file: Path, damage: str) -> Iterator[None]:
    content = file.read_bytes()
    changed = DAMAGES[damage](content)
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    yield
    file.write_bytes(content)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of four files, and its manifest, which has blocks of 8 bytes."""
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 8)
    folder = tmp_path / "step_1"
    (folder / "model").mkdir(parents=True)
    for name, size in {"a": 20, "b": 16, "model/c": 5, "model/empty": 0}.items():
        (folder / name).write_bytes(bytes(range(65, 65 + size)))
    write_manifest(folder)
    return folder, read_manifest(folder)


def named(folder: Path, problems: list[Problem]) -> dict[str, object]:
    return {str(Path(problem.where).relative_to(folder)): problem.value for problem in problems}


def test_every_kind_of_damage_of_every_file_is_found_alone(small):
    folder, manifest = small
    assert {name: (proof.size, len(proof.xxh3)) for name, proof in manifest.items()} == {
        "a": (20, 3),
        "b": (16, 2),
        "model/c": (5, 1),
        "model/empty": (0, 1),
    }
    assert damages(folder, manifest) == []
    for name, proof in manifest.items():
        file, content = folder / name, (folder / name).read_bytes()
        kinds = {"longer": content + b"x", "gone": None}
        if content:
            kinds |= {"shorter": content[:-1], "empty": b"", "zeros": bytes(len(content))}
            kinds |= {
                f"bit of byte {n}": content[:n] + bytes([content[n] ^ 4]) + content[n + 1 :] for n in range(proof.size)
            }
        for kind, changed in kinds.items():
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            found = named(folder, damages(folder, manifest))
            start = int(kind.split()[-1]) // 8 * 8 if kind.startswith("bit") else 0
            expected = {
                "gone": "no such file",
                "longer": f"{len(content) + 1} bytes",
                "shorter": f"{len(content) - 1} bytes",
                "empty": "0 bytes",
            }.get(kind, f"other bytes, somewhere from {start} to {min(start + 8, proof.size)}")
            assert found == {name: expected}, kind
            file.write_bytes(content)
    (folder / "model/d").touch()
    assert damages(folder, manifest) == [], "a file that somebody put there is no damage of those that were written"


def test_only_the_chosen_blocks_are_read_and_every_size_is_looked_at(small):
    folder, manifest = small
    (folder / "a").write_bytes((folder / "a").read_bytes()[:-1] + b"!")
    (folder / "model/c").unlink()
    (folder / "model/empty").write_bytes(b"x")
    sizes = {"model/c": "no such file", "model/empty": "1 bytes"}
    assert named(folder, damages(folder, manifest, {"a": [0, 1], "b": [1]})) == sizes
    assert named(folder, damages(folder, manifest, {"a": [2]})).keys() == {"a", *sizes}


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_share_the_work(small, monkeypatch, ranks):
    folder, manifest = small
    for name in manifest:
        (folder / name).write_bytes(bytes(manifest[name].size) or b"x")
    read: list[tuple[Path, int]] = []
    checksum = manifest_module._checksum
    monkeypatch.setattr(manifest_module, "_checksum", lambda block: read.append(block) or checksum(block))
    found = [named(folder, damages(folder, manifest, part=(rank, ranks))) for rank in range(ranks)]
    assert {name for one in found for name in one} == set(manifest)
    assert len(read) == len(set(read)) == 7, "each block is read by one rank"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model, and the checkpoints of steps 1 and 2 of two ranks."""
    folder = tmp_path_factory.mktemp("start")
    config = make_config(folder, make_model(folder / "model"), checkpointing={"enabled": True, "save_period": 1})
    assert run_distributed(train, 2, str(config), [TP2, "dpo.max_num_steps=2"], init_process_group=False) == [0, 0]
    return folder


@pytest.fixture
def run(start, tmp_path):
    """A copy of it, and the overrides that make it another run."""
    folder = Path(shutil.copytree(start, tmp_path / "run"))
    overrides = [TP2, f"checkpointing.checkpoint_dir={folder}/checkpoints", f"logger.log_dir={folder}/logs"]
    return folder, [*overrides, "dpo.max_num_steps=3"]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def unnamed_damages(folder: str) -> tuple[int, list[str]]:
    """On each rank: the damages made, and those that a reader of the newest checkpoint passed over or didn't name."""
    from megadpo.checkpoint.verify import require_whole_weights
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.resume import newest_whole

    parallel = initialize(Grid(), setup_device("cpu"))
    checkpoint, made, missed = Path(folder) / "step_2", 0, []
    keys = [key for key in read_metadata(checkpoint / "model").state_dict_metadata if not key.startswith("optimizer")]
    alone: dict[str, Callable[[], Any]] = {
        "export": lambda: export_hf(checkpoint, Path(folder) / "exported"),
        "verify": lambda: verify(checkpoint),
    }
    together: dict[str, Callable[[], Any]] = {
        "resume": lambda: newest_whole(Path(folder), parallel, on_damage="stop"),
        "weights": lambda: require_whole_weights(checkpoint, keys),
    }
    for file in files_of(checkpoint):
        before_tensors = file.parent.name not in ("model", "rng")
        for damage in DAMAGES:
            made += 1
            with damaged(file, damage) if parallel.rank == 0 else contextlib.nullcontext():
                dist.barrier()
                readers = {**together, **(alone if parallel.rank == 0 else {})}
                if before_tensors:
                    readers["source"] = lambda: resolve_source(str(checkpoint), "policy.model_name")
                for reader, read in readers.items():
                    try:
                        read()
                        missed.append(f"{reader}: {damage} {file.name}: passed over")
                    except ConfigError as error:
                        if str(file) not in str(error) or "step_1" not in str(error):
                            missed.append(f"{reader}: {damage} {file.name}: {error}")
                dist.barrier()
    newest_whole(Path(folder), parallel, on_damage="stop")
    return made, missed


@pytest.mark.distributed
def test_every_damage_of_every_file_is_named(start, tmp_path):
    folder = shutil.copytree(start / "checkpoints", tmp_path / "checkpoints")
    for made, missed in run_distributed(unnamed_damages, 2, str(folder), init_process_group=False):
        assert missed == []
        assert made >= 70
    assert sorted(path.name for path in folder.iterdir()) == [".run", "step_1", "step_2"]


@pytest.mark.distributed
def test_a_resume_stops_at_damage_or_goes_on_from_before_it(run):
    folder, overrides = run
    original = read_metrics(folder / "logs")
    newest = folder / "checkpoints/step_2"
    file = max(newest.glob("model/__1_*.distcp"))
    file.write_bytes(flip(file.read_bytes(), 1))
    config = str(folder / "config.yaml")
    for code, printed in run_distributed(train_and_read, 2, config, overrides, init_process_group=False):
        assert code == 2 and f"{file}: got 'other bytes, somewhere from 0 to" in printed and "Traceback" not in printed
        assert (
            f"mv {newest} {newest}.damaged; then the run resumes from the one before, {folder}/checkpoints/step_1"
            in printed
        )
    previous = [*overrides, "checkpointing.on_damage=previous"]
    (code, printed), (other, _) = run_distributed(train_and_read, 2, config, previous, init_process_group=False)
    assert code == other == 0 and f"{newest} is damaged ({file}: other bytes" in printed, printed
    assert {path.name for path in newest.parent.glob("step*")} == {"step_1", "step_2", "step_2.damaged", "step_3"}
    again = read_metrics(folder / "logs")
    assert [record["train/loss"] for record in again[:2]] == [record["train/loss"] for record in original]
    assert [record["step"] for record in again] == [1, 2, 3] and verify(newest)


def evaluate_and_read(config: str, overrides: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        return evaluate(config, overrides), printed.getvalue()


@pytest.mark.distributed
def test_an_evaluation_and_an_export_stop_at_damage(run, capsys):
    folder, _ = run
    step = folder / "checkpoints/step_2"
    file = step / "model/__0_0.distcp"
    with damaged(file, "one bit"):
        overrides = [f"policy.model_name={step}", f"logger.log_dir={folder}/evaluated"]
        config = str(folder / "config.yaml")
        for code, printed in run_distributed(evaluate_and_read, 2, config, overrides, init_process_group=False):
            assert code == 2 and f"{file}: got 'other bytes" in printed
        assert main(["export", str(step), str(folder / "exported")]) == 2
        assert str(file) in capsys.readouterr().err and not (folder / "exported").exists()
        steps = [str(folder / f"checkpoints/step_{number}") for number in (1, 2)]
        assert main(["verify", *steps]) == 2
        output = capsys.readouterr()
        assert output.out == f"{steps[0]}: whole\n" and str(file) in output.err
    assert main(["verify", str(folder / "checkpoints")]) == 0
    assert capsys.readouterr().out == "".join(f"{step}: whole\n" for step in steps)
    assert main(["verify", str(folder)]) == 2 and "got 'no checkpoint'" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_checkpoint_from_before_manifests_is_read_and_said(run, capsys, caplog):
    folder, overrides = run
    step = folder / "checkpoints/step_2"
    (step / "manifest.json").unlink()
    record = json.loads((step / "megadpo.json").read_text())
    assert record.pop("manifest") is True
    (step / "megadpo.json").write_text(json.dumps(record))
    export_hf(step, folder / "exported")
    assert caplog.text.count("its files can't be verified") == 1
    assert main(["verify", str(step)]) == 2
    assert "its files can't be verified" in capsys.readouterr().err
    config = str(folder / "config.yaml")
    (code, printed), _ = run_distributed(train_and_read, 2, config, overrides, init_process_group=False)
    assert code == 0 and printed.count("its files can't be verified") == 1
    assert verify(folder / "checkpoints/step_3")


def test_an_imported_model_has_a_manifest(start, tmp_path):
    import_hf(start / "model", tmp_path / "imported")
    assert verify(tmp_path / "imported")
    file = tmp_path / "imported/model/__2_0.distcp"
    with damaged(file, "one bit"), pytest.raises(ConfigError, match="__2_0.distcp: got 'other bytes"):
        export_hf(tmp_path / "imported", tmp_path / "exported")
    export_hf(tmp_path / "imported", tmp_path / "exported")


def test_an_export_reads_the_blocks_of_the_weights_only(start, tmp_path, monkeypatch):
    """Of a file of many blocks, with weights and optimizer state in it."""
    for module in (manifest_module, dist_folder):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1024)
    checkpoint = Path(shutil.copytree(start / "checkpoints/step_2", tmp_path / "step_2"))
    write_manifest(checkpoint)
    assert max(len(proof.xxh3) for proof in (read_manifest(checkpoint) or {}).values()) > 100
    places = read_metadata(checkpoint / "model").storage_data
    for key, refused in (("optimizer.state.exp_avg.output_layer.weight", False), ("output_layer.weight", True)):
        place = next(place for index, place in places.items() if index.fqn == key)
        file = checkpoint / "model" / place.relative_path
        content = bytearray(file.read_bytes())
        content[place.offset + place.length // 2] ^= 4
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file.name}: got 'other bytes, somewhere from \d+ to"):
            verify(checkpoint)
        with pytest.raises(ConfigError, match=file.name) if refused else contextlib.nullcontext():
            export_hf(checkpoint, tmp_path / key)


def test_a_folder_of_a_later_format_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "FORMAT", 2)
    write_manifest(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="got 2; expected manifest format 1"):
        verify(tmp_path)
