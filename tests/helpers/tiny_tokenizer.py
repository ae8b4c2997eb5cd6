"""A byte-level BPE tokenizer made on the spot: real merges, any text, a vocabulary of a few hundred."""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Human: what is the sum of two and three? Assistant: the sum is five. ",
    "Human: where is the sea? Assistant: at the shore, where the sand is. ",
    "What is it that the other one said there? It is this and that, then. ",
)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of the Qwen family, without its default system message."""


@functools.lru_cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(
    *,
    vocab_size: int = 320,
    adds_bos: bool = False,
    adds_eos: bool = False,
    has_eos: bool = True,
    has_pad: bool = True,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A new tokenizer with ids <s> 0, </s> 1, <pad> 2. `adds_bos` and `adds_eos`: to every text that asks for special
    tokens, as Llama's does with BOS. `vocab_size` is a target: the corpus may have fewer merges to give."""
    backend = Tokenizer.from_str(_trained(vocab_size))
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>" if has_eos else None,
        pad_token="<pad>" if has_pad else None,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """The merges learned, first to last: for tests that need text on both sides of one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
