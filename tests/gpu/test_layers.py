"""Transformer Engine's layers on a GPU: logps and gradients against float64, beside the local layers.

The bounds were set before any run on a GPU, from bfloat16's rounding: a value is rounded by up to 2^-9 = 2.0e-3 of
itself. A residual stream through 4 layers takes about 6 roundings a layer that are independent of each other, so the final
hidden state is off by about sqrt(24) x 2.0e-3 / sqrt(3) = 5.6e-3 of its norm.

- logps: the logits of this model (weights of 0.02, hidden size 512) have a standard deviation of 0.45 nats, so one
  token's logp is off by about 0.45 x 5.6e-3 x sqrt(2) = 3.6e-3, and a sum over n tokens by sqrt(n) times that. Bound
  for the root mean square of six answers' errors: 0.01 sqrt(n) nats, 2.8 times as much.
- gradients: backward rounds as often as forward, on values that forward has rounded: about sqrt(3) x 5.6e-3 = 1e-2 of a
  parameter's gradient norm. Bound: 4e-2 for each parameter.
- Beside the local layers: a gradient's error may be 1.5 times the local one's. Of root mean squares of six, two
  of equal rounding are apart by up to 2.5 times in 98 of 100 draws (F distribution, 6 and 6): a logp error's bound.
- float8 (e4m3, 3 bits of mantissa) rounds each factor of a product by up to 2^-4, 0.036 in the mean square, both
  factors: 5e-2 a product, which sums over 512 channels do not average away in the relative norm. 4 layers of 4
  products feed the residual stream, each a part of it: bounds 0.15 sqrt(n) nats, and 0.4 of a gradient's norm.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.models import float64_logps_and_gradients, make_gpu_model
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import VOCAB
from tests.model.kernels.test_kernels import random_pairs

pytestmark = pytest.mark.gpu
LENGTHS = [(300, 40, 90), (17, 5, 8), (120, 130, 60)]
WEIGHTS = [1.0, -1.0, 0.5, -0.5, 2.0, -1.0]
TE_WORKSPACE = 33 << 20
"""Its products have cuBLAS's workspace of 32 MiB from torch's allocator, which is where peaks are measured, once a process
(2.11: pytorch/cpp_extensions/gemm.py:31); torch's own products have theirs outside."""
EXPECTED_LOGP, EXPECTED_GRADIENT = 3.6e-3, 1e-2


def measured(folder, options, share_prompt):
    """Logps, and gradients by Hugging Face name, on the CPU in float64; what was chosen; peak memory in bytes."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import Fp8Config, MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture, weight_table
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights, named_global_parameters, to_hf
    from megadpo.optimizer.build import wrap_for_training
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(), setup_device("auto"))
    seed_everything(1, parallel)
    arch = read_architecture(folder)
    table = weight_table(arch)
    kernel = options.pop("attention_kernel", "auto")
    fp8 = Fp8Config(**options.pop("fp8_cfg", {}))
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        attention_kernel=kernel,
        megatron_cfg=MegatronConfig(fp8_cfg=fp8, **options),
    )
    chunks = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights(chunks, arch, folder, parallel.grid)
    [wrapped] = wrap_for_training(chunks, policy)  # fused weight gradients go straight into its buffers
    pairs = random_pairs(LENGTHS, VOCAB)
    batch = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=128, pad_token_id=0).to(parallel.device)
    wrapped.zero_grad_buffer()
    torch.cuda.reset_peak_memory_stats()
    logps = wrapped(batch)
    (logps * torch.tensor(WEIGHTS, device=logps.device)).sum().backward()
    wrapped.finish_grad_sync()
    gradients = {}
    for name, parameter in named_global_parameters(wrapped):
        gradients |= to_hf(table.by_name[name], parameter.main_grad.detach().double().cpu())
    chosen = (
        chunks[0].config.transformer_impl,
        any(table.fused for table in chunks[0].rotaries.values()),
        chunks[0].config.fp8,
    )
    return logps.detach().double().cpu(), gradients, chosen, torch.cuda.max_memory_allocated()


def on_gpu(folder, share_prompt=True, **options):
    return run_distributed(measured, 1, str(folder), options, share_prompt, init_process_group=False, timeout_s=240)[0]


def errors(result, want_logps, want_gradients):
    """Root mean square of the logps' errors over sqrt(tokens), and each gradient's relative error."""
    tokens = torch.tensor([n for _, *answers in LENGTHS for n in answers], dtype=torch.float64)
    logps, gradients = result[:2]
    assert set(gradients) == set(want_gradients)
    relative = {
        name: float((gradients[name] - want).norm() / want.norm())
        for name, want in want_gradients.items()
        if want.norm() > 0
    }
    return float(((logps - want_logps).square() / tokens).mean().sqrt()), relative


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_against_float64_and_the_local_layers(case, share_prompt, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    folder = make_gpu_model(tmp_path / "model", case)
    want = float64_logps_and_gradients(folder, random_pairs(LENGTHS, VOCAB), WEIGHTS)
    local = on_gpu(folder, share_prompt, transformer_impl="local")
    te = on_gpu(folder, share_prompt, transformer_impl="transformer_engine")
    assert local[2][0] == "local" and te[2][:2] == ("transformer_engine", True)
    (local_logp, local_gradients), (te_logp, te_gradients) = errors(local, *want), errors(te, *want)
    print(f"{case}: logps off by {local_logp:.1e} (local), {te_logp:.1e} (TE) nats / sqrt(tokens); worst gradient "
          f"{max(local_gradients.values()):.1e}, {max(te_gradients.values()):.1e}; "
          f"peak {local[3] >> 20}, {te[3] >> 20} MiB")  # fmt: skip
    assert te_logp < 0.01 and local_logp < 0.01
    assert te_logp < 2.5 * max(local_logp, EXPECTED_LOGP)
    for name, error in te_gradients.items():
        assert error < 4e-2, name
        assert error < 1.5 * max(local_gradients[name], EXPECTED_GRADIENT), name
    assert te[3] < 1.1 * local[3] + TE_WORKSPACE, "more memory than the local layers"


@pytest.mark.parametrize("kernel", ["varlen", "transformer_engine"])
def test_either_attention_kernel_under_either_layers(kernel, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    folder = make_gpu_model(tmp_path / "model")
    want = float64_logps_and_gradients(folder, random_pairs(LENGTHS, VOCAB), WEIGHTS)
    for implementation in ("local", "transformer_engine"):
        found = on_gpu(folder, transformer_impl=implementation, attention_kernel=kernel)
        logp, gradients = errors(found, *want)
        assert logp < 0.01 and max(gradients.values()) < 4e-2


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_fusion": False}, {"apply_rope_fusion": False}, {"fused_single_qkv_rope": True}],
)
def test_each_fusion_can_be_switched(options, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    folder = make_gpu_model(tmp_path / "model")
    want = float64_logps_and_gradients(folder, random_pairs(LENGTHS, VOCAB), WEIGHTS)
    logp, gradients = errors(on_gpu(folder, transformer_impl="transformer_engine", **options), *want)
    assert logp < 0.01 and max(gradients.values()) < 4e-2


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_float8_against_float64(recipe, fp8, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    folder = make_gpu_model(tmp_path / "model")
    want = float64_logps_and_gradients(folder, random_pairs(LENGTHS, VOCAB), WEIGHTS)
    result = on_gpu(folder, fp8_cfg={"enabled": True, "fp8": fp8, "fp8_recipe": recipe})
    logp, gradients = errors(result, *want)
    print(f"{recipe} {fp8}: logps off by {logp:.1e} nats / sqrt(tokens), worst gradient {max(gradients.values()):.1e}")
    assert result[2][2] == fp8
    assert 1e-4 < logp < 0.15, "as exact as bfloat16 would mean that nothing ran in float8"
    assert max(gradients.values()) < 0.4


def test_fused_adam_takes_torchs_steps():
    """20 steps on float32 parameters, gradients from a seed: both compute in float32, so each step may differ by a few
    roundings (6e-8 each) of the update, 1e-3 at most here: bound 1e-6 absolute after 20."""
    optimizers = pytest.importorskip("transformer_engine.pytorch.optimizers")
    generator = torch.Generator("cuda").manual_seed(0)
    ours = [torch.randn(n, 64, device="cuda", generator=generator) for n in (1, 7, 300)]
    theirs = [x.clone() for x in ours]
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    fused, plain = optimizers.FusedAdam(ours, adam_w_mode=True, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, device="cuda", generator=generator)
            other.grad = mine.grad.clone()
        fused.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
