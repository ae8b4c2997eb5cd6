"""What a Hugging Face folder's config.json says of the model, read without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megadpo.config.architecture_moe import MoeArchitecture, read_moe
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.rope import Report, read_rope

Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"]

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# What transformers takes where config.json has no such key; "heads" means: as many as num_attention_heads.
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"num_key_value_heads": "heads", "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "qwen2_moe": {"num_key_value_heads": 16, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
}
_RESTORE = "restore the model's own config.json"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A supported model, sizes in elements."""

    family: Family
    hf_class: str
    """Class name in config.json, e.g. LlamaForCausalLM."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Of a dense layer; a model with experts has its sizes in `moe`."""
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None: plain RoPE. Else `rope_type` linear, llama3 or yarn and every number of its formula (see rope.py)."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention output projection: False in every supported model."""
    mlp_bias: bool
    """False in every supported model."""
    qk_norm: bool
    """RMSNorm on each head of queries and keys, before RoPE."""
    sliding_window: int | None
    """Keys that a query sees at most; None: all. Runs that would notice it are refused by check_layout."""
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    torch_dtype: str | None
    """Dtype of the stored weights, e.g. bfloat16, where config.json says."""
    moe: MoeArchitecture | None = None
    """The experts of every layer; None: a dense model."""


def read_architecture(folder: str | Path, field: str = "policy.model_name") -> Architecture:
    """Read `folder`/config.json, in transformers 4's or 5's spelling. field: what names the folder, for messages.

    Raises ConfigError with every reason why the model can't be run: folder or file missing, broken JSON, a class that
    is not supported, or a setting that this code doesn't compute.
    """
    path = Path(folder) / "config.json"
    return parse_architecture(_read_json(Path(folder), path, field), str(path))


def parse_architecture(raw: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """As read_architecture, from the parsed JSON; `where` names the file in problems."""
    problems: list[Problem] = []

    def report(key: str, value: object, expected: str, fix: str) -> None:
        problems.append(Problem(f"{where}: {key}", value, expected, fix))

    hf_class = _class_name(raw)
    family = _FAMILIES.get(hf_class)
    if family is None:
        shown = hf_class or raw.get("model_type")
        expected = "one of " + ", ".join(_FAMILIES)
        fix = f"model_type {raw.get('model_type')!r} is not supported; choose a model of a supported architecture"
        raise ConfigError(Problem(f"{where}: architectures", shown, expected, fix))

    if raw.get("model_type") not in (None, family):  # by which transformers chooses the class
        report("model_type", raw["model_type"], f"{family}, of the class {hf_class}", _RESTORE)
    sizes = _sizes(raw, family, report)
    if not problems:
        _check_divisors(raw, sizes, report)
    eps = raw.get("rms_norm_eps", _DEFAULTS[family].get("rms_norm_eps", 1e-6))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps <= 0:
        report("rms_norm_eps", eps, "a positive number", _RESTORE)
        eps = 1e-6
    _refuse_unsupported(raw, report)
    theta, scaling = read_rope(_with_theta(raw, family), sizes["max_position_embeddings"], report)
    moe = read_moe(raw, family, report)
    window = _sliding_window(raw, family, sizes["num_hidden_layers"], report)
    if problems:
        raise ConfigError(problems)
    eos = raw.get("eos_token_id")
    return Architecture(
        family=family,
        hf_class=hf_class,
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        ffn_hidden_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=float(eps),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=sizes["max_position_embeddings"],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family == "qwen2_moe" and bool(raw.get("qkv_bias", True))),
        output_bias=False,
        mlp_bias=False,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        sliding_window=window,
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=raw.get("pad_token_id"),
        torch_dtype=raw.get("dtype") or raw.get("torch_dtype"),
        moe=moe,
    )


def _with_theta(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """`raw` with the class's own rope_theta where config.json has none (10000 is everybody's, and read_rope's)."""
    default = _DEFAULTS[family].get("rope_theta")
    return raw if default is None else {"rope_theta": default, **raw}


def _read_json(folder: Path, path: Path, field: str) -> dict[str, Any]:
    hint = "give a Hugging Face model folder (config.json, *.safetensors, tokenizer files)"
    if not folder.is_dir():
        raise ConfigError(Problem(field, str(folder), "an existing folder", hint))
    if not path.is_file():
        raise ConfigError(Problem(field, str(folder), "a folder that holds config.json", hint))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(str(path), str(error), "readable JSON", _RESTORE)) from error
    if not isinstance(raw, dict):
        raise ConfigError(Problem(str(path), type(raw).__name__, "a JSON object", _RESTORE))
    return raw


def _class_name(raw: Mapping[str, Any]) -> str:
    """The model class; where config.json names none, the one its model_type belongs to."""
    named = raw.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    for hf_class, family in _FAMILIES.items():
        if raw.get("model_type") == family:
            return hf_class
    return ""


def _sizes(raw: Mapping[str, Any], family: Family, report: Report) -> dict[str, int]:
    """The model's sizes under config.json's names; 1 stands for what could not be read."""
    sizes = {
        key: _positive_int(raw.get(key), key, report)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    }
    heads, defaults = sizes["num_attention_heads"], _DEFAULTS[family]
    # null key-value heads mean "no grouping" to transformers; an absent key means the class's default.
    groups = raw.get("num_key_value_heads", defaults["num_key_value_heads"])
    sizes["num_key_value_heads"] = (
        heads if groups in (None, "heads") else _positive_int(groups, "num_key_value_heads", report)
    )
    length = raw.get("max_position_embeddings", defaults["max_position_embeddings"])
    sizes["max_position_embeddings"] = _positive_int(length, "max_position_embeddings", report)
    head_dim = raw.get("head_dim", defaults.get("head_dim"))
    if head_dim is None:
        head_dim = max(1, sizes["hidden_size"] // heads)
    sizes["head_dim"] = _positive_int(head_dim, "head_dim", report)
    return sizes


def _check_divisors(raw: Mapping[str, Any], sizes: Mapping[str, int], report: Report) -> None:
    heads, groups, hidden = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["hidden_size"]
    if hidden % heads and raw.get("head_dim") is None:
        report("num_attention_heads", heads, f"a divisor of hidden_size {hidden}", _RESTORE)
    if heads % groups:
        report("num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}", _RESTORE)


def _positive_int(value: object, key: str, report: Report) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        report(key, value, "a whole number >= 1", _RESTORE)
        return 1
    return value


def _refuse_unsupported(raw: Mapping[str, Any], report: Report) -> None:
    """Settings that transformers would compute and this code would not."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        report("hidden_act", activation, "silu", "only SwiGLU models are supported")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            report(key, raw[key], "false", f"models with {key} are not supported")
    if raw.get("attention_dropout"):
        report("attention_dropout", raw["attention_dropout"], "0.0", "set it to 0.0: DPO compares exact logps")
    if raw.get("quantization_config"):
        fix = "export the model's weights in bfloat16 or float32 and train those"
        report("quantization_config", raw["quantization_config"], "none", fix)


def _sliding_window(raw: Mapping[str, Any], family: Family, num_layers: int, report: Report) -> int | None:
    """Width of the window where any layer uses one (layers are not told apart: check_layout refuses what would)."""
    types = raw.get("layer_types")
    if types is not None:
        unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if unknown:
            expected = "full_attention and sliding_attention only"
            report("layer_types", ", ".join(unknown), expected, "choose a model with plain attention")
    if family == "llama":
        return None
    window = raw.get("sliding_window", _DEFAULTS[family]["sliding_window"])
    if family.startswith("qwen"):
        if not raw.get("use_sliding_window", False):
            return None
        if types is not None:
            slides = "sliding_attention" in types
        else:  # in the MoE classes some layer slides whatever max_window_layers says
            slides = family.endswith("_moe") or raw.get("max_window_layers", 28) < num_layers
        if not slides:
            return None
    return None if window is None else _positive_int(window, "sliding_window", report)
