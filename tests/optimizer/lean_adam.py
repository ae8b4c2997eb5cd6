"""Transformer Engine's FusedAdam over bfloat16 weights with remainders, by torch's operations on any device: what the real
one computes with `master_weights`, `store_param_remainders` and `use_decoupled_grad` (2.11: fused_adam.py; the formula and
its order: common/multi_tensor/adam.cu, AdamFunctorMasterParamRemainder)."""

from __future__ import annotations

import torch

from megadpo.optimizer import one_pass


class FusedAdam(torch.optim.Optimizer):
    """`wide`: compute in float64, from the same rounded state."""

    def __init__(self, params, exp_avg_dtype, exp_avg_sq_dtype, wide=False, **options):
        super().__init__(params, {"bias_correction": True, **options})
        self.adam_w_mode = 1
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.number = torch.float64 if wide else torch.float32

    def initialize_state(self, p, store_param_remainders):
        assert store_param_remainders
        dtypes = {**self.dtypes, "master_param": torch.int16}
        self.state[p] = {name: torch.zeros_like(p, dtype=dtype) for name, dtype in dtypes.items()}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.initialize_state(p, True)
                if p.decoupled_grad is not None:
                    self.update(p, group)

    def rounded(self, x):
        return x.to(self.number)

    def update(self, p, group):
        beta1, beta2 = map(one_pass._in_float32, group["betas"])
        lr, eps, decay = (one_pass._in_float32(group[name]) for name in ("lr", "eps", "weight_decay"))
        unbias1, unbias2 = (
            (one_pass._in_float32(1 - b ** group["step"]) if group["bias_correction"] else 1.0) for b in (beta1, beta2)
        )
        rest1, rest2 = (one_pass._in_float32(1 - b) for b in (beta1, beta2))
        state = self.state[p]
        g, m, v = (x.to(self.number) for x in (p.decoupled_grad, state["exp_avg"], state["exp_avg_sq"]))
        main = main_weight(p, state["master_param"]).to(self.number)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        # By float64, since torch's own quotients and roots of float32 may be a bit off; rounded twice is rounded once here
        root = self.rounded(self.rounded(v.double() / unbias2).double().sqrt()) + eps
        main = main - lr * (self.rounded(self.rounded(m.double() / unbias1).double() / root.double()) + decay * main)
        weight, remainder = split(main.float())
        p.copy_(weight)
        state["master_param"].copy_(remainder)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)


def main_weight(weight, remainder):
    """bfloat16 and int16 -> the float32 weight. bfloat16 is rounded up where the remainder's first bit is 1."""
    upper, lower = weight.view(torch.int16).int(), remainder.int()
    return ((upper - (lower < 0).int()) * 65536 + (lower & 0xFFFF)).view(torch.float32)


def split(main):
    """The inverse."""
    bits = main.view(torch.int32)
    lower = (bits & 0xFFFF).to(torch.int16)
    upper = (bits >> 16) + (lower < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), lower
