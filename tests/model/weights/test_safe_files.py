"""A checkpoint is data: code in any of its files is refused by name, by everything that reads one, and not run."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata

from megadpo.config.problems import ConfigError
from megadpo.model.manifest import write_manifest
from megadpo.model.source import ModelSource, weights_fingerprint
from megadpo.model.weights import export_hf, import_hf
from megadpo.model.weights.safe_files import read_data, read_metadata
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import evaluate, make_config, make_model, train, train_and_read


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model, and a run's checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("start")
    model = make_model(folder / "model")
    config = make_config(folder, model, checkpointing={"enabled": True})
    assert run_distributed(train, 1, str(config), ["dpo.max_num_steps=1"], init_process_group=False) == [0]
    return folder


def as_metadata(proof: Path, file: Path) -> None:
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Code(proof)
    file.write_bytes(pickle.dumps(metadata))


def as_value(proof: Path, file: Path) -> None:
    state = torch.load(file, weights_only=False)
    torch.save({**state, "python": Code(proof)}, file)


PLANTED = {
    "metadata": ("model/.metadata", as_metadata, "model/.metadata"),
    "common": ("model/common.pt", as_value, "model/common.pt"),
    "rng": ("rng/rank_0.pt", as_value, "rng/rank_0.pt"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", PLANTED)
def test_a_resume_runs_no_code_of_the_checkpoint(case, start, tmp_path):
    name, plant, said = PLANTED[case]
    folder = shutil.copytree(start, tmp_path / "run")
    plant(tmp_path / "proof", folder / "checkpoints/step_1" / name)
    write_manifest(folder / "checkpoints/step_1")  # as whoever plants code can, too
    overrides = [f"checkpointing.checkpoint_dir={folder}/checkpoints", f"logger.log_dir={folder}/logs"]
    [(code, printed)] = run_distributed(
        train_and_read, 1, str(start / "config.yaml"), overrides, init_process_group=False
    )
    assert not (tmp_path / "proof").exists()
    assert code == 2 and said in printed and "Traceback" not in printed, printed


def evaluate_and_read(config: str, overrides: list[str]) -> tuple[int, str]:
    import contextlib

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = evaluate(config, overrides)
    return code, printed.getvalue()


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["metadata", "common"])
def test_an_evaluation_runs_no_code_of_the_checkpoint(case, start, tmp_path):
    name, plant, said = PLANTED[case]
    step = Path(shutil.copytree(start / "checkpoints/step_1", tmp_path / "step_1"))
    plant(tmp_path / "proof", step / name)
    write_manifest(step)
    overrides = [f"policy.model_name={step}", f"logger.log_dir={tmp_path}"]
    [(code, printed)] = run_distributed(
        evaluate_and_read, 1, str(start / "config.yaml"), overrides, init_process_group=False
    )
    assert not (tmp_path / "proof").exists()
    assert code == 2 and said in printed, printed


def load_an_object(folder: str, proof: str) -> tuple[Any, str]:
    """The objects that one reads, and the refusal of another, which is code."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megadpo.checkpoint.load import _load
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device

    initialize(Grid(), setup_device("cpu"))

    def save(name: str, value: Any) -> Path:
        (Path(folder) / name / "model").mkdir(parents=True)
        dist_checkpointing.save({"x": ShardedObject("x", value, (1,), (0,))}, str(Path(folder) / name / "model"))
        torch.save({}, Path(folder) / name / "model/common.pt")  # as runs do, and megatron-core from 0.19 on does not
        return Path(folder) / name

    def load(step: Path) -> Any:
        return _load({"x": ShardedObject("x", None, (1,), (0,))}, step)["x"]

    read = load(save("good", {"a": 1}))
    with pytest.raises(ConfigError) as refused:
        load(save("bad", Code(Path(proof))))
    return read, str(refused.value)


@pytest.mark.distributed
def test_an_object_among_the_tensors_is_data(tmp_path):
    [(read, refusal)] = run_distributed(
        load_an_object, 1, str(tmp_path), str(tmp_path / "proof"), init_process_group=False
    )
    assert read == {"a": 1}
    assert "bad/model: x/shard_0_1: got 'UnpicklingError: Unsupported" in refusal
    assert not (tmp_path / "proof").exists()


def test_an_export_and_a_fingerprint_run_no_code_of_the_checkpoint(start, tmp_path):
    step = Path(shutil.copytree(start / "checkpoints/step_1", tmp_path / "step_1"))
    as_metadata(tmp_path / "proof", step / "model/.metadata")
    write_manifest(step)
    with pytest.raises(ConfigError, match=r"model/\.metadata.*asks for pathlib(\._local)?\.Path\.touch"):
        export_hf(step, tmp_path / "exported")
    with pytest.raises(ConfigError, match=r"model/\.metadata"):
        weights_fingerprint(ModelSource(step / "hf", step), every_tensor=True)
    assert not (tmp_path / "proof").exists() and not (tmp_path / "exported").exists()


def test_metadata_names_files_of_its_folder_only(start, tmp_path):
    file = Path(shutil.copytree(start / "checkpoints/step_1/model", tmp_path / "model")) / ".metadata"
    for path in ("../rng/rank_0.pt", "/etc/passwd"):
        metadata = read_metadata(file.parent)
        next(iter(metadata.storage_data.values())).relative_path = path
        file.write_bytes(pickle.dumps(metadata))
        with pytest.raises(ConfigError, match=f"names '{path}', which is no file of this folder"):
            read_metadata(file.parent)
        shutil.copy(start / "checkpoints/step_1/model/.metadata", file)


def test_anything_else_in_the_place_of_a_pickle_is_refused(tmp_path):
    file = tmp_path / ".metadata"
    other = dcp_metadata.Metadata({}, storage_data=None)
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    contents = [b"", b"\0" * 99, good[:90], pickle.dumps([1]), pickle.dumps(other), pickle.dumps(torch.nn.Linear(1, 1))]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"\.metadata: got"):
            read_metadata(tmp_path)
        with pytest.raises(ConfigError, match=r"\.metadata: got"):
            read_data(file, file)
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        read_data(tmp_path / "none", tmp_path / "none")


def test_states_of_random_numbers_are_data(tmp_path):
    torch.save({"numpy": np.random.get_state(), "torch": torch.get_rng_state()}, tmp_path / "state.pt")
    state = read_data(tmp_path / "state.pt", "")
    assert all(np.array_equal(a, b) for a, b in zip(state["numpy"], np.random.get_state(), strict=True))


def test_links_out_of_the_model_folder_are_not_copied(start, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("of another user")
    model = Path(shutil.copytree(start / "model", tmp_path / "model"))
    (model / "notes.md").symlink_to(secret)
    (model / "folder").symlink_to(tmp_path)
    (model / "inside.md").symlink_to(model / "config.json")
    import_hf(model, tmp_path / "megatron")
    copied = {path.name for path in (tmp_path / "megatron/hf").rglob("*")}
    assert copied == {"inside.md", *(path.name for path in start.glob("model/*.json"))}
    shutil.move(model / "config.json", tmp_path / "config.json")
    (model / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"model/config\.json: got 'a link to .*cp --remove-destination"):
        import_hf(model, tmp_path / "other")


def test_links_of_the_hubs_cache_are_copied(start, tmp_path):
    blobs = tmp_path / "models--a--b/blobs"
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((start / "model").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    import_hf(snapshot, tmp_path / "megatron")
    assert {path.name for path in start.glob("model/*.json")} == {p.name for p in (tmp_path / "megatron/hf").iterdir()}
