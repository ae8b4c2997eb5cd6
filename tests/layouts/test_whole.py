"""The whole matrix, for `make test-layouts`, which writes docs/layouts.md from what these tests find."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.layouts.matrix import all_cases


@pytest.mark.distributed
@pytest.mark.layouts
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_equals_one_process_or_is_refused(case, bench, record_property):
    record_property("layout", json.dumps([case.name, dataclasses.asdict(bench.prove(case))]))
