"""What policy.model_name may name."""

from __future__ import annotations

import os
from fnmatch import fnmatch

import pytest

from megadpo.config.problems import ConfigError
from megadpo.model.source import resolve_source


def test_a_file_and_a_folder_that_is_not_there_are_told_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=r"policy\.model_name: .*this is a file; fix: name the folder it is in"):
        resolve_source(str(file), "policy.model_name")
    with pytest.raises(ConfigError, match="there is no such folder"):
        resolve_source(str(tmp_path / "none"), "policy.model_name")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("place", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("part", [".", "hf", "model"])
def test_a_pipe_or_a_device_among_the_files(tmp_path, place, part):
    folder = tmp_path / "m" / part
    folder.mkdir(parents=True)
    (tmp_path / "m/megadpo.json").write_text("{}")
    os.mkfifo(folder / place)
    (folder / "weights.safetensors").symlink_to("/dev/zero")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError) as caught:
        resolve_source(str(tmp_path / "m"), "policy.model_name")
    assert [one.value for one in caught.value.problems] == ["a named pipe, not a file", "a device, not a file"]
    assert place in caught.value.problems[0].where


def test_a_hub_model_comes_with_its_card_and_licence(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or tmp_path
    )
    resolve_source("some/model", "policy.model_name", weights=False)
    for file in ("config.json", "README.md", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md"):
        assert any(fnmatch(file, pattern) for pattern in asked[0]), file
    assert not any(fnmatch("model.safetensors", pattern) for pattern in asked[0])
