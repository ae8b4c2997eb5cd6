"""torch's own flash attention over segments of different lengths (torch.nn.attention.varlen)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import RaggedKernel, RaggedPlan, sinks_gradient, widened, with_sinks

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn.attention import varlen
else:
    torch, varlen = Lazy("torch"), Lazy("torch.nn.attention.varlen")


@ATTENTION_KERNELS.add("varlen")
class VarlenKernel(RaggedKernel):
    """Without a window its window_size is (-1, 0): all keys to the left, none to the right. Flash attention aligns at the bottom
    right."""

    name, most_width = "varlen", 256
    priority: ClassVar[int | None] = 2
    computes: ClassVar[Mapping[str, str]] = {
        "window": "flash attention's own",
        "sinks": "from the log-sum-exp of scores",
        "value_width": "padded with zero channels",
    }

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RaggedPlan,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert softcap is None, "`computes` has no softcap"
        if sinks is None and q.shape[2] == v.shape[2]:
            out = varlen.varlen_attn(q, k, v, *_ends(plan), **_options(q, k, plan, scale))
            assert isinstance(out, torch.Tensor)  # a tuple only with return_aux
            return out
        attended: Tensor = _around_flash().apply(q, k, v, sinks, plan, q.shape[2] ** -0.5 if scale is None else scale)
        return attended


def _ends(plan: RaggedPlan) -> tuple[Any, ...]:
    return plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k


def _options(q: Tensor, k: Tensor, plan: RaggedPlan, scale: float | None) -> dict[str, Any]:
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _has_enable_gqa() else {}
    return {"window_size": plan.window_size, **grouped, **({} if scale is None else {"scale": scale})}


@functools.cache
def _has_enable_gqa() -> bool:
    """Whether fewer heads of keys than of queries need `enable_gqa`. torch 2.11 doesn't have it and takes them anyway."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def _forward(ctx, q, k, v, sinks, plan, scale):  # type: ignore[no-untyped-def]
    width = max(q.shape[2], v.shape[2])
    options = {**_options(q, k, plan, scale), "return_aux": varlen.AuxRequest(lse=True)}
    out, log_sum = varlen.varlen_attn(*(widened(x, width) for x in (q, k, v)), *_ends(plan), **options)  # type: ignore[arg-type]
    out = out[..., : v.shape[2]].transpose(0, 1)  # [H, T, E], as the log-sum-exp is [H, T]
    if sinks is not None:
        out, log_sum = with_sinks(out, log_sum, sinks)
    out = out.transpose(0, 1).contiguous()
    ctx.save_for_backward(q, k, v, sinks, out, log_sum)
    ctx.plan, ctx.scale = plan, scale
    return out


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, log_sum = ctx.saved_tensors
    width = max(q.shape[2], v.shape[2])
    window = ctx.plan.window_size
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of dropout, which is off
    found = torch.ops.aten._flash_attention_backward(
        *(widened(x, width) for x in (grad, q, k, v, out)),
        log_sum,
        *_ends(ctx.plan),
        0.0,
        window == (-1, 0),
        random,
        torch.empty(0, device=q.device),
        scale=ctx.scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    d_sinks = None
    if sinks is not None:
        d_sinks = sinks_gradient(grad.transpose(0, 1), out.transpose(0, 1), log_sum, sinks).to(sinks.dtype)
    return *(d_x[..., : x.shape[2]] for d_x, x in zip(found, (q, k, v), strict=True)), d_sinks, None, None


@functools.cache
def _around_flash() -> Any:
    """The autograd function of `_forward` and `_backward`, for values of another width and for sinks, for which flash attention
    has no arguments. It saves the tensors without padding, and the output and log-sum-exp with sinks."""
    members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
    return type("AroundFlash", (torch.autograd.Function,), members)
