"""SmolLM3: Llama with some layers without RoPE."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.windows import with_windows


@FAMILIES.add("smollm3")
class SmolLM3(Family):
    """Every fourth layer, or those with a 0 in no_rope_layers, has no RoPE. Only these may have windows."""

    classes = ("SmolLM3ForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    }

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        unturned = self._unturned(config, arch.num_layers)
        if config.get("use_sliding_window"):
            arch = with_windows(config, arch, usual=lambda number: number in unturned)
        return arch.with_attention(only=unturned, rotary=None)

    def _unturned(self, config: HfConfig, layers: int) -> list[int]:
        turned = config.get("no_rope_layers")  # 1: the layer has RoPE
        if turned is None:
            every = config.size("no_rope_layer_interval")
            return [number for number in range(layers) if (number + 1) % every == 0]
        if not isinstance(turned, list) or len(turned) < layers:
            config.report("no_rope_layers", turned, f"a 0 or a 1 for each of the {layers} layers")
            return []
        return [number for number, turns in enumerate(turned[:layers]) if not turns]
