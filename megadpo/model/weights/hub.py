"""Uploads an exported folder to the hub."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.problems import ConfigError, Problem, first_line


def push_to_hub(folder: str | Path, name: str) -> str:
    """Upload all files in `folder` to the model repository `name`; a missing repository is created, private. Returns its
    address. Raises ConfigError with the hub's reason."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Trained with megadpo")
        return str(address)
    except Exception as error:  # the hub client raises many kinds
        expected = f"a repository that can be written (the hub says: {first_line(error)})"
        fix = f"log in with `hf auth login`, then `hf upload {name} {folder}`: the folder is complete"
        raise ConfigError(Problem("--push-to-hub", name, expected, fix)) from error
