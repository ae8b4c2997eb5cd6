"""The whole matrix, for `make test-layouts`, which writes docs/layouts.md from what these tests find."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.layouts.matrix import MOST_PROCESSES, all_cases
from tests.layouts.prove import NOT_RUN


@pytest.mark.distributed
@pytest.mark.layouts
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_equals_one_process_or_is_refused(case, bench, record_property):
    proved = bench.prove(case)
    record_property("layout", json.dumps([case.name, dataclasses.asdict(proved)]))
    if proved == NOT_RUN:
        pytest.skip(f"takes {case.world_size} processes, tests start {MOST_PROCESSES} at most")
