"""The head for GPUs: matrix products on blocks of the vocabulary, and one fused pass over each block.

Each block has a part of the vocabulary and all answer tokens. So one product gives a block's rows of the weight's gradient,
and no float32 accumulator of the weight's size is needed (as with chunks of tokens).

Costs, with A answer tokens, this rank's V rows of the weight, hidden size h and blocks of C columns:

    forward    one product of 2 A V h operations; A V float32 logits written and read once
    backward   three such products; logits, and their gradients in the hidden dtype, written and read once; the gradient
               of `hidden` read and written V / C times in float32
    memory     A C float32 and A C of the hidden dtype, with A C at most MOST_LOGITS, and A h float32; independent of V
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megadpo.config.known import MIXED_PRODUCTS, Known
from megadpo.config.problems import Problem
from megadpo.config.variants import LOGPROB_KERNELS, Lazy
from megadpo.model.heads import LogpsHead

if TYPE_CHECKING:
    from megadpo.model.heads.triton import fused
else:  # Triton is imported when the head first runs
    fused = Lazy("megadpo.model.heads.triton.fused")

MOST_LOGITS = 1 << 27
"""Most logits at a time: 512 MiB in float32, and 256 MiB for their gradients in bfloat16."""
COLUMN_MULTIPLE = 128
"""Columns of a block are a multiple of this tile size."""


@LOGPROB_KERNELS.add("triton")
class TritonHead(LogpsHead):
    """For bfloat16 and float32; logits are float32. Never waits for the device."""

    name, priority = "triton", 1

    def problems(self, known: Known) -> Iterator[Problem]:
        field = LOGPROB_KERNELS.field
        if known.device == "cpu":
            yield Problem(field, self.name, "auto or torch on the device cpu: this head needs CUDA", "set it to auto")
        elif known.machine is not None:
            for needed in ("triton", MIXED_PRODUCTS):
                if (reason := known.machine.why_missing(needed)) is not None:
                    fix = "set it to auto or torch, or pip install triton, and torch 2.11 or newer for CUDA"
                    yield Problem(field, self.name, f"auto or torch without {needed}: {reason}", fix)

    def __call__(self, hidden, weight, targets, *, vocab_start, group, chunk_tokens, softcap=None):  # type: ignore[no-untyped-def]
        """At most MOST_LOGITS and at most chunk_tokens x V/tp logits exist at a time (or COLUMN_MULTIPLE for each token, if
        that is more). Raises ValueError for another dtype, or two different ones."""
        columns = block_columns(hidden.shape[0], weight.shape[0], chunk_tokens)
        return fused.logps(hidden, weight, targets - vocab_start, group, columns, softcap)


def block_columns(rows: int, vocab: int, chunk_tokens: int) -> int:
    """Rows of the weight in a block, for `rows` tokens: as many as the memory limits allow, in whole tiles."""
    most = min(MOST_LOGITS, chunk_tokens * vocab) // max(rows, 1)
    return min(vocab, max(1, most // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
