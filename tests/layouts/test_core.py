"""A small choice of the matrix, for `make test`: refused with a reason, or equal to one process to 1e-5."""

from __future__ import annotations

import pytest

from tests.layouts.matrix import MOST_PROCESSES, core_cases, options_of
from tests.layouts.models import MODELS
from tests.layouts.prove import NOT_RUN


@pytest.mark.distributed
@pytest.mark.parametrize("case", core_cases(), ids=lambda case: case.name)
def test_equals_one_process_or_is_refused(case, bench):
    if bench.prove(case) == NOT_RUN:
        pytest.skip(f"takes {case.world_size} processes, tests start {MOST_PROCESSES} at most")


def test_every_option_is_in_the_core_with_another_on_every_model():
    core = core_cases()
    assert min(len(case.options) for case in core) == 2
    for model in MODELS:
        met = {option.name for case in core if case.model is model for option in case.options}
        assert met == {option.name for option in options_of(model)}
