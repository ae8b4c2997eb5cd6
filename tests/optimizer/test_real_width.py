"""The gradient norm at the width of a real model: one layer under the tied embedding of Qwen2.5-0.5B, 151,936 x 896."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config
from tests.helpers.tiny_tokenizer import tiny_tokenizer

LIMIT = 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.Qwen2Config(**sizes, **heads, tie_word_embeddings=True, dtype="float32")
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(vocab_size=320).save_pretrained(folder)
    return folder


def norms_of_a_step(config: str, overrides: list[str]) -> tuple[float, float, float]:
    """Target for run_distributed: the gradient norm as a step gives it, the same in float64, and, in float64, the norm
    after clipping. The weights are left alone: an optimizer's state would be twice their size."""
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    from megadpo.config.grid import Grid
    from megadpo.config.load import load_config
    from megadpo.parallel import destroy, initialize, setup_device
    from megadpo.train.setup import prepare

    cfg = load_config(config, overrides)
    parallel = initialize(Grid.of(cfg), setup_device("cpu"))
    run = prepare(cfg, parallel)
    optimizer = run.trainer.optimizer

    def exact_norm() -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for parameter in optimizer.get_parameters():
            if param_is_not_tensor_parallel_duplicate(parameter):
                total += sum(part.double().square().sum() for part in parameter.grad.flatten().split(2**20))
        dist.all_reduce(total)
        return float(total.sqrt())

    seen: list[float] = []
    inner = optimizer.get_grad_norm

    def get_grad_norm() -> float:
        seen.append(exact_norm())
        return float(inner())

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = lambda: seen.append(exact_norm())
    outcome = run.trainer.step(next(iter(run.inputs.train_loader.batches(0, 0))))
    destroy()
    return outcome.grad_norm, seen[0], seen[1]


@pytest.mark.distributed
def test_the_gradient_norm_of_a_real_vocabulary(model, tmp_path):
    sft = {"preference_loss_weight": 0.0, "sft_loss_weight": 1.0, "reference": {"mode": "none"}}
    policy = {"train_global_batch_size": 1, "max_grad_norm": LIMIT}
    config = make_config(tmp_path, model, pairs=1, dpo=sft, policy=policy)
    norms = {}
    for ranks in (1, 2):
        layout = [f"policy.megatron_cfg.tensor_model_parallel_size={ranks}"]
        for norm, exact, clipped in run_distributed(
            norms_of_a_step, ranks, str(config), layout, init_process_group=False, timeout_s=280
        ):
            assert exact > LIMIT
            assert norm == pytest.approx(exact, rel=1e-6)
            assert clipped == pytest.approx(LIMIT, rel=3e-6)  # clipping divides by the norm + 1e-6
            norms[ranks] = norm
    assert norms[2] == pytest.approx(norms[1], rel=1e-5)
