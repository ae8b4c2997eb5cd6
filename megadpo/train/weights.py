"""Weights into a built model, from whichever kind of folder they are in."""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.checkpoint import load_weights
from megadpo.config.architecture import Architecture
from megadpo.model.gpt import PairModel
from megadpo.model.source import ModelSource
from megadpo.model.weights.load import load_hf_weights, place_of
from megadpo.parallel import ParallelContext


def fill(model: Sequence[PairModel], source: ModelSource, arch: Architecture, parallel: ParallelContext) -> None:
    """Load the weights that `source` names into the chunks of this rank."""
    if source.megatron is not None:
        load_weights(model, source.megatron)
    else:
        load_hf_weights(model, arch, source.hf_files, place_of(parallel))
