"""The table of families in docs/families.md: what test_equal.py holds to transformers, and what config.json may not say.
`python -m tests.families.page` writes it anew; test_page.py compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadpo.config.architecture import Architecture, Experts
from megadpo.config.variants import ATTENTION_KERNELS, FAMILIES
from megadpo.families import parse_architecture
from megadpo.families.reading import HfConfig
from megadpo.model.kernels import asked_of
from tests.families.cases import CASES, config_of
from tests.families.layouts import LAYOUTS, takes_part

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- families: written by python -m tests.families.page -->", "<!-- end of the families -->"
HEAD = ("class in `architectures`", "what is checked", "layouts", "kernels", "refused in config.json")
LONG = 1 << 20
EVERYWHERE = {"hidden_act", "quantization_config"}
"""The page says so below its table."""


def with_families(text: str) -> str:
    """The page with its table, which stands between two comments, written anew."""
    found: dict[str, list[Architecture]] = {}
    for case in CASES:
        arch = parse_architecture(config_of(case))
        found.setdefault(arch.hf_class, []).append(arch)
    rows = [HEAD, ("---",) * len(HEAD), *(_row(name, found[name]) for name in sorted(found))]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def _row(name: str, archs: list[Architecture]) -> tuple[str, ...]:
    features = dict.fromkeys(feature for arch in archs for feature in _features(arch))
    layouts = [layout for layout, sizes in LAYOUTS.items() if takes_part(archs[0], sizes)]
    asked = {one for arch in archs for attention in arch.attentions for one in asked_of(attention, LONG)}
    kernels = [f"`{kernel.name}`" for kernel in ATTENTION_KERNELS if kernel.can(asked, 1)]
    refused = ", ".join(f"`{key}`" for key in _refused(archs[0].family, name))
    return f"`{name}`", ", ".join(features), ", ".join(layouts), ", ".join(kernels), refused


def _features(arch: Architecture) -> Iterator[str]:
    """What of a model is beyond Llama's first form, in words."""
    if (arch.residual_multiplier, arch.logit_divisor) != (1.0, 1.0):
        yield "multipliers"
    if arch.norms.zero_centred:
        yield "norms times 1 + weight"
    if arch.norms.placement != "pre":
        yield {"post": "norms after each part", "sandwich": "norms before and after each part"}[arch.norms.placement]
    for attention in arch.attentions:
        yield from _of_attention(attention)
    if arch.delta_net is not None:
        yield "gated delta nets"
    mlp = arch.mlp or (arch.experts and arch.experts.mlp)
    if mlp and mlp.activation != "silu":
        yield {"gelu_tanh": "GELU", "clamped": "clamped gates"}[mlp.activation]
    if arch.logit_softcap is not None:
        yield "a soft-cap on logits"
    if arch.mixed:
        yield "dense layers and layers of experts"
    if arch.experts is not None:
        yield from _of_experts(arch.experts)
    if arch.tie_word_embeddings:
        yield "tied embeddings"


def _of_attention(one: Any) -> Iterator[str]:
    norms = {
        "head": "norms of heads",
        "head_after_rope": "norms of turned heads",
        "width": "norms of all heads together",
    }
    if one.latent is not None:
        yield "latent attention"
    if one.qkv_bias:
        yield "biases"
    if one.qk_norm != "none":
        yield norms[one.qk_norm]
    if one.output_gate:
        yield "output gates"
    if one.window is not None:
        yield "windows"
    if one.sinks:
        yield "sinks"
    if one.logit_softcap is not None:
        yield "a soft-cap on scores"
    if one.rotary is None:
        yield "layers without RoPE"
        return
    if one.rotary.dims < one.head_dim:
        yield "RoPE of a part of heads"
    if one.rotary.interleaved:
        yield "RoPE of neighbouring channels"
    if one.rotary.scaling is not None:
        yield one.rotary.scaling.rope_type


def _of_experts(experts: Experts) -> Iterator[str]:
    yield "sigmoid router" if experts.router.scores == "sigmoid" else "softmax router"
    if experts.router.correction_bias:
        yield "correction bias"
    if experts.router.groups > 1:
        yield "groups of experts"
    if experts.shared_ffn_size is not None:
        yield "shared expert"


class _Asked(HfConfig):
    """Remembers the keys that a family refuses some values of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys: dict[str, None] = {}

    def refuse(self, key: str, expected: str, fix: str, *, unless: tuple[object, ...] = ()) -> None:
        self.keys[key] = None


def _refused(family: str, name: str) -> list[str]:
    one = FAMILIES[family]()
    asked = _Asked({"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1}, family, name, one.defaults, "")
    one.read(asked)
    return [key for key in asked.keys if key not in EVERYWHERE]


if __name__ == "__main__":
    PAGE.write_text(with_families(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
