"""Sliding windows, in every layer or by `layer_types`."""

from __future__ import annotations

from collections.abc import Callable

from megadpo.config.architecture import Architecture, Attention
from megadpo.families.reading import HfConfig


def window(config: HfConfig) -> int | None:
    """Most keys that a query sees; None: all."""
    return None if config.get("sliding_window") is None else config.size("sliding_window")


def sliding_layers(config: HfConfig, layers: int, usual: Callable[[int], bool]) -> list[int]:
    """Numbers of the layers with the window, from 0: those with sliding_attention in `layer_types`; without it those for
    which usual(number)."""
    types = config.get("layer_types")
    if types is None:
        return [number for number in range(layers) if usual(number)]
    if len(types) != layers:
        config.report("layer_types", f"{len(types)} types", f"one for each of the {layers} layers")
        return []
    return [number for number, kind in enumerate(types) if kind == "sliding_attention"]


def having_windows(arch: Architecture) -> list[int]:
    """The numbers of the layers that have a window."""
    kinds = [layer.attention for layer in arch.layers]
    return [number for number, one in enumerate(kinds) if isinstance(one, Attention) and one.window is not None]


def with_windows(config: HfConfig, arch: Architecture, usual: Callable[[int], bool]) -> Architecture:
    """`arch` with the window `sliding_window` in its sliding layers: by `layer_types`, or else by usual(number), if there is
    a window."""
    size = window(config)
    sliding = sliding_layers(config, arch.num_layers, lambda number: size is not None and usual(number))
    if sliding and size is None:
        config.report("sliding_window", None, "a whole number, since layer_types has sliding_attention")
    return arch.with_attention(only=sliding, window=size)
