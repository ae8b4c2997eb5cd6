"""For every test: one thread a process, no time limit inside hypothesis, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before torch is imported anywhere: several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Token caches (data.cache_dir) of this session only, for the processes it starts as well
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="megadpo-test-cache-")

import hypothesis
import pytest

from tests.helpers.configs import config, refusals, write  # noqa: F401  fixtures

# A shared machine is slow now and then; pytest's own timeout finds what hangs.
hypothesis.settings.register_profile("megadpo", deadline=None)
hypothesis.settings.load_profile("megadpo")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
