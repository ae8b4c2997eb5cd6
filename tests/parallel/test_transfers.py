"""The shapes that a pipeline stage expects, in the order in which its neighbours send."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadpo.parallel import transfers
from megadpo.parallel.transfers import KnownShapes

TURNS = [0, 1, 0, 1, 2, 3, 2, 3]  # two chunks: each two micro-batches through the first chunk, then through the second


@pytest.mark.parametrize(
    ("chunks", "stage", "forward", "backward"),
    [
        # the first chunk's input is the pack itself, and the last chunk's gradient the loss's
        (2, 0, [0, 1, 2, 3], TURNS),
        (2, 1, TURNS, [0, 1, 2, 3]),
        (1, 1, [0, 1, 2, 3], []),
        (1, 0, [], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_each_receive_has_the_shape_of_its_micro_batch(
    chunks, stage, forward, backward, sequence_parallel, monkeypatch
):
    group = SimpleNamespace(rank=lambda: stage, size=lambda: 2)
    monkeypatch.setattr(transfers.P2PCommunicator, "__init__", lambda self, group, _: setattr(self, "pp_group", group))
    monkeypatch.setattr(transfers.parallel_state, "get_pipeline_model_parallel_group", lambda: group)
    monkeypatch.setattr(transfers.parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    config = SimpleNamespace(microbatch_group_size_per_vp_stage=2, sequence_parallel=sequence_parallel, hidden_size=16)
    tokens = [8, 24, 40, 56]
    shapes = KnownShapes(config, tokens, chunks)

    def received(**both):
        return shapes._communicate_shapes(None, None, **both)

    expected = [[count // (2 if sequence_parallel else 1), 1, 16] for count in tokens]
    for number in forward:
        assert received(recv_prev=True, recv_next=False) == (expected[number], [0, 0, 0])
    for number in backward:
        assert received(recv_prev=False, recv_next=True) == ([0, 0, 0], expected[number])
    for both in ({"recv_prev": True, "recv_next": False}, {"recv_prev": False, "recv_next": True}):
        with pytest.raises(StopIteration):
            received(**both)
