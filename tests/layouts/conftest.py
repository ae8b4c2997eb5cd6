"""The model folders and runs of one process that the cases of a session share."""

from __future__ import annotations

import pytest

from tests.layouts.prove import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))
