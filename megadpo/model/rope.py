"""Rotary position embedding (RoPE): its frequencies, and the rotation.

Frequencies are computed in float32 as in transformers, so that log-probabilities agree up to float32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from megadpo.config.architecture import RopeScaling, Rotary


def inverse_frequencies(rotary: Rotary) -> tuple[torch.Tensor, float]:
    """theta_i, [dims/2] float32 on the CPU: channel pair i is rotated by position x theta_i. And the factor of cos and sin.

    RoFormer (arXiv 2104.09864) eq. 15 for plain RoPE; position interpolation (arXiv 2306.15595) for 'linear';
    Llama 3.1's frequency-dependent interpolation for 'llama3'; YaRN (arXiv 2309.00071) eq. 17-23 for 'yarn';
    LongRoPE (arXiv 2402.13753) for 'longrope'.
    """
    exponent = torch.arange(0, rotary.dims, 2, dtype=torch.int64).float() / rotary.dims
    plain = 1.0 / (rotary.theta**exponent)
    scaling = rotary.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, scaling.attention_factor
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), scaling.attention_factor
    if scaling.rope_type == "longrope":
        short = torch.tensor(scaling.short_factor, dtype=torch.float32)
        return 1.0 / (short * rotary.theta**exponent), scaling.attention_factor
    return _yarn(plain, rotary, scaling), scaling.attention_factor


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are multiplied by `factor`, short ones kept, those between interpolated."""
    old_length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert old_length is not None and low is not None and high is not None
    wavelength = 2 * math.pi / plain
    stretched = plain / scaling.factor
    blend = (old_length / wavelength - low) / (high - low)
    blended = (1 - blend) * stretched + blend * plain
    result = torch.where(wavelength > old_length / low, stretched, plain)
    medium = ~(wavelength < old_length / high) & ~(wavelength > old_length / low)
    return torch.where(medium, blended, result)


def _yarn(plain: torch.Tensor, rotary: Rotary, scaling: RopeScaling) -> torch.Tensor:
    """NTK-by-parts interpolation (YaRN eq. 19-20). The attention temperature (eq. 22) is `scaling.attention_factor`."""
    dim, old_length = rotary.dims, scaling.original_max_position_embeddings
    assert old_length is not None and scaling.beta_fast is not None and scaling.beta_slow is not None

    def dimension_of(rotations: float) -> float:
        """The dimension that makes `rotations` full rotations over the original context."""
        return dim * math.log(old_length / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


class RotaryTable:
    """The rotation at given positions."""

    def __init__(self, rotary: Rotary, device: torch.device, *, fused: bool = False) -> None:
        """fused: use Transformer Engine's kernel, which needs CUDA. It has no factor of cos and sin (YaRN's); with one,
        torch's operations are used."""
        inverse, self.factor = inverse_frequencies(rotary)
        self.interleaved = rotary.interleaved
        self.fused = fused and self.factor == 1.0 and not self.interleaved
        self.key = (rotary, self.fused)
        """Tables with equal keys give equal rotations."""
        self.inverse = inverse.to(device)

    @torch.no_grad()
    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """positions [T] int64 -> the rotation of tokens at these positions. Angles are float32 for every dtype."""
        if self.fused:
            angles = positions.to(torch.float32)[:, None] * self.inverse[None, :]
            # Said to be one sequence of T tokens, so that the kernel takes row i of the angles for token i.
            return FusedRotation(torch.cat([angles, angles], dim=-1)[:, None, None, :], _one_sequence(positions))
        cos, sin = self.cos_sin(positions)
        return PlainRotation(cos[:, None, :].to(dtype), sin[:, None, :].to(dtype), self.interleaved)

    @torch.no_grad()
    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 -> [T, dims/2] float32 twice, the factor included."""
        angles = positions.to(torch.float32)[:, None] * self.inverse[None, :]
        return angles.cos() * self.factor, angles.sin() * self.factor


def _one_sequence(tokens: torch.Tensor) -> torch.Tensor:
    """[0, T] int32 on the tokens' device, without a copy from the host."""
    return torch.arange(2, dtype=torch.int32, device=tokens.device) * tokens.numel()


class Rotation(Protocol):
    """Rotates x [T, H, D] by the positions of its tokens. All layers of a micro-batch share it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class PlainRotation:
    """With torch's operations, on any device: the halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin)."""

    cos: torch.Tensor
    """[T, 1, D/2], without gradient, as sin."""
    sin: torch.Tensor
    interleaved: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = _Rotate.apply(x, self.cos, self.sin, self.interleaved)
        return turned


@dataclass(frozen=True)
class FusedRotation:
    """With one kernel of Transformer Engine, forward and backward."""

    angles: torch.Tensor
    """[T, 1, 1, D] float32; both halves are equal."""
    cu_seqlens: torch.Tensor
    """[0, T] int32."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

        return apply_rotary_pos_emb(x, self.angles, tensor_format="thd", fused=True, cu_seqlens=self.cu_seqlens)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so only cos and sin are saved."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1, ctx.interleaved), None, None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int, interleaved: bool) -> torch.Tensor:
    """cos and sin [T, 1, dims/2]. Channels from dims on are copied."""
    turned, dims = torch.empty(x.shape, dtype=x.dtype, device=x.device), 2 * cos.shape[-1]
    if interleaved:
        pairs = [[tensor[..., first:dims:2] for first in (0, 1)] for tensor in (x, turned)]
    else:
        pairs = [list(tensor[..., :dims].chunk(2, dim=-1)) for tensor in (x, turned)]
    (x1, x2), (y1, y2) = pairs
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-direction)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=direction)
    if dims < x.shape[-1]:
        turned[..., dims:] = x[..., dims:]
    return turned
