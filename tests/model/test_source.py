"""What policy.model_name may name."""

from __future__ import annotations

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
