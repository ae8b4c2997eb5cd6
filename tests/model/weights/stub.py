"""A stand-in for a model: parameters of given names, without process groups."""

from __future__ import annotations

import torch


class Stub(torch.nn.Module):
    """A model with parameters of these names, nothing else."""

    def __init__(self, parameters: dict[str, torch.Tensor], first_layer: int = 0) -> None:
        super().__init__()
        for name, value in parameters.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(last, torch.nn.Parameter(value))
        for number, layer in self.get_submodule("decoder.layers").named_children():
            layer.layer_number = first_layer + int(number) + 1
