"""Five DPO steps by TRL's DPOTrainer and by megadpo, side by side; exit code 1 where a step's loss differs by more than 1e-4.

    python benchmarks/parity_trl.py --trl-python TRL_VENV/bin/python             # small model, first 80 pairs of --data
    python benchmarks/parity_trl.py --case hh-tiny --stored                       # against tests/parity/stored.json, no TRL
    python benchmarks/parity_trl.py --case hh-tiny --trl-python ... --store       # write those figures anew

Both sides start from the same files: a small Llama with random weights and a tokenizer trained on the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

import torch  # noqa: E402

from benchmarks import make_llama, sides  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402
from megadpo.config.schema_peft import PeftConfig  # noqa: E402
from megadpo.families import parse_architecture  # noqa: E402
from megadpo.lora.peft_folder import WEIGHTS_FILE, tensor_name, write_peft  # noqa: E402
from megadpo.lora.targets import find_targets  # noqa: E402

STORED = REPOSITORY / "tests" / "parity" / "stored.json"
STEPS, GLOBAL_BATCH_PAIRS = 5, 16
TOLERANCES = {
    # Largest difference allowed, relative to the larger of the two; the loss is what the comparison is about
    "loss": 1e-4,
    "grad_norm": 1e-4,
    "logps/chosen": 1e-5,
    "logps/rejected": 1e-5,
}
LAYOUTS = {
    "one": sides.Layout(),
    "one-repeated": sides.Layout(share_prompt=False),
    "one-unpacked": sides.Layout(packing=False),
    "tp2": sides.Layout(tensor_parallel=2),
    "tp2pp2": sides.Layout(tensor_parallel=2, pipeline_parallel=2),
    "tp2pp2sp": sides.Layout(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
}
LONGEST_TOKENS = (2048, 4096)  # a sequence, a pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, data and a loss. `made`: pairs made by `make_llama.made_pairs` instead of those of --data."""

    size: str
    made: bool
    add_bos: bool
    micro_batch_pairs: int
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of TRL's DPOConfig that both sides have under one name; {}: loss_type sigmoid."""
    average: bool = False
    """TRL takes means over an answer's tokens in this loss."""
    lora: str = ""
    """Train an adapter, from the same numbers on both sides. new: B is 0. trained: it is not, and the reference has the
    adapter as it was."""

    @property
    def overrides(self) -> list[str]:
        """`loss` in megadpo's config."""
        average = ["dpo.preference_average_log_probs=true", "dpo.sft_average_log_probs=false"] if self.average else []
        return [f"dpo.{name}={value}" for name, value in self.loss.items()] + average

    @property
    def names(self) -> list[str]:
        """What is compared: under ld_alpha TRL logs the weighted logps, megadpo those of whole answers."""
        return [name for name in TOLERANCES if "ld_alpha" not in self.loss or not name.startswith("logps/")]

    def lora_overrides(self, adapter: str) -> list[str]:
        """The same adapter in megadpo's config."""
        if not self.lora:
            return []
        peft = f"{{enabled: true, dim: {LORA.dim}, alpha: {LORA.alpha}, target_modules: [all-linear], init_from: {adapter}}}"
        named = [f"dpo.reference.adapter={adapter}"] if self.lora == "trained" else []
        return [f"policy.megatron_cfg.peft={peft}", *named]


LOSSES: dict[str, dict[str, Any]] = {
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.001},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.05},
    "sigmoid_norm": {},
}
"""Every loss that TRL's DPOTrainer has too, beside sigmoid."""
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "js_divergence": {},
    "alpha_divergence": {"f_alpha_divergence_coef": 0.5},
}
LORA = PeftConfig(enabled=True, dim=8, alpha=16.0, target_modules=("all-linear",))
COMBINED: dict[str, dict[str, Any]] = {
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    "norm_ld_weighting": {"loss_type": "sigmoid_norm", "ld_alpha": 0.3, "use_weighting": True},
}
"""Weights of tokens, of pairs and of losses."""
CASES = {
    "hh-small": Case(size="small", made=False, add_bos=False, micro_batch_pairs=4),
    "hh-tiny": Case(size="tiny", made=False, add_bos=False, micro_batch_pairs=4),
    "made-tiny": Case(size="tiny", made=True, add_bos=True, micro_batch_pairs=8),
}
for _name in ("new", "trained"):
    CASES[f"made-tiny-lora-{_name}"] = dataclasses.replace(CASES["made-tiny"], lora=_name)
for _name, _options in LOSSES.items():
    CASES[f"made-tiny-{_name}"] = dataclasses.replace(
        CASES["made-tiny"], loss={"loss_type": _name, **_options}, average=_name == "ipo"
    )
for _name, _options in DIVERGENCES.items():
    CASES[f"made-tiny-{_name}"] = dataclasses.replace(CASES["made-tiny"], loss={"f_divergence_type": _name, **_options})
for _name, _options in COMBINED.items():
    CASES[f"made-tiny-{_name}"] = dataclasses.replace(CASES["made-tiny"], loss=_options)


def prepare(case: Case, data: Path, folder: Path) -> Spec:
    """Writes model and tokenizer (and made data) into `folder`; returns what both sides shall run.

    Rate, weight decay and clipping are strong enough that each, left out or wrong by a hundredth (decay: by half),
    moves the loss beyond its tolerance in five steps.
    """
    if case.made:
        data = folder / "pairs.jsonl"
        rows = make_llama.made_pairs(STEPS * GLOBAL_BATCH_PAIRS)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = folder / "model"
    make_llama.make(make_llama.read_pairs(data), model, make_llama.SIZES[case.size], add_bos=case.add_bos)
    return Spec(
        data=str(data),
        model=str(model),
        output_dir="",
        steps=STEPS,
        global_batch_pairs=GLOBAL_BATCH_PAIRS,
        micro_batch_pairs=case.micro_batch_pairs,
        learning_rate=5e-3 if case.lora else 5e-4,
        weight_decay=1.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        adapter=make_adapter(folder / "adapter", model, trained=case.lora == "trained") if case.lora else "",
        extra=case.loss
        | ({"loss_type": [case.loss["loss_type"]]} if isinstance(case.loss.get("loss_type"), str) else {}),
    )


def make_adapter(folder: Path, model: Path, *, trained: bool) -> str:
    """An adapter on all linear layers; returns its folder. trained: B is not 0."""
    arch = parse_architecture(json.loads((model / "config.json").read_text(encoding="utf-8")))
    generator = torch.Generator().manual_seed(0)
    tensors, modules = {}, []
    for target in find_targets(LORA, arch):
        for number, module in enumerate(target.modules):
            modules.append(module)
            a = torch.randn(LORA.dim, target.in_features, generator=generator) / target.in_features**0.5
            b = torch.randn(target.out_features(number), LORA.dim, generator=generator) / 50
            tensors |= {tensor_name(module, "A"): a, tensor_name(module, "B"): b if trained else b * 0}
    folder.mkdir()
    write_peft(folder, LORA, tensors, modules, base=str(model), arch=arch)
    return str(folder)


def fingerprints(spec: Spec) -> dict[str, str]:
    """What must be the same for stored figures to hold: the bits of the data and of the weights."""
    return {
        "data_sha256": sides.sha256(Path(spec.data)),
        "weights_sha256": sides.sha256(Path(spec.model) / "model.safetensors"),
        "token_sha256": token_digest(spec),
        **({"adapter_sha256": sides.sha256(Path(spec.adapter) / WEIGHTS_FILE)} if spec.adapter else {}),
    }


def token_digest(spec: Spec) -> str:
    """sha256 over the pairs' ids as TRL's rules make them, computed without TRL; trl_worker.py prints what TRL has."""
    import hashlib

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(spec.model) / "tokenizer.json"))
    rows = []
    for pair in make_llama.read_pairs(Path(spec.data), spec.steps * spec.global_batch_pairs):
        prompt = tokenizer.encode(pair["prompt"]).ids
        both = [
            tokenizer.encode(pair["prompt"] + pair[answer] + make_llama.EOS).ids for answer in ("chosen", "rejected")
        ]
        if any(ids[: len(prompt)] != prompt for ids in both):
            raise ValueError("a prompt's ids are not a prefix of prompt + answer: TRL and megadpo differ there")
        rows.append([prompt, *(ids[len(prompt) :] for ids in both)])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def compare(
    theirs: list[dict[str, float]], ours: list[dict[str, float]], names: Sequence[str] = tuple(TOLERANCES)
) -> tuple[list[str], bool]:
    """A table of both sides by step and name, and whether every tolerance holds."""
    lines = [f"{'step':>4}  {'':16}{'TRL':>16}{'megadpo':>16}{'relative':>12}{'allowed':>10}"]
    good = len(theirs) == len(ours)
    if not good:
        lines.append(f"TRL made {len(theirs)} steps, megadpo {len(ours)}")
    for number, (their, our) in enumerate(zip(theirs, ours, strict=False), start=1):
        for name in names:
            allowed = TOLERANCES[name]
            a, b = their[name], our[name]
            relative = abs(a - b) / max(abs(a), abs(b))
            fits = relative <= allowed  # False for nan
            good &= fits
            mark = "" if fits else "  BEYOND"
            lines.append(f"{number:>4}  {name:16}{a:>16.9f}{b:>16.9f}{relative:>12.1e}{allowed:>10.0e}{mark}")
    return lines, good


def check_stored(case_name: str, spec: Spec) -> list[dict[str, float]]:
    """The stored steps of TRL for this case. Raises ValueError where they were made from other bits."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))["cases"][case_name]
    now = fingerprints(spec)
    changed = [f"{key}: stored {stored[key]}, here {value}" for key, value in now.items() if stored[key] != value]
    if changed:
        raise ValueError("the stored figures are of other data, weights or tokens:\n  " + "\n  ".join(changed))
    steps: list[dict[str, float]] = stored["steps"]
    return steps


def store(case_name: str, spec: Spec, side: sides.Side) -> None:
    """Puts TRL's figures for this case into the file, with what it takes to make them again."""
    content = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {"cases": {}}
    kept = [*TOLERANCES, "logged_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    content["cases"][case_name] = {
        "command": f"python benchmarks/parity_trl.py --case {case_name} --trl-python TRL_VENV/bin/python --store",
        "versions": side.details["versions"],
        **fingerprints(spec),
        **({"differs": CASES[case_name].loss} if CASES[case_name].loss else {"dpo_config": side.details["dpo_config"]}),
        "steps": [{name: step[name] for name in kept} for step in side.steps],
    }
    STORED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{STORED}: {case_name} written")


def their_side(arguments: argparse.Namespace, spec: Spec) -> list[dict[str, float]]:
    """TRL's steps, stored or run now."""
    if arguments.stored:
        return check_stored(arguments.case, spec)
    side = sides.run_trl(spec, arguments.trl_python)
    versions = side.details["versions"]
    print(f"TRL {versions['trl']}, transformers {versions['transformers']}, torch {versions['torch']}")
    if side.details["token_sha256"] != token_digest(spec):
        raise ValueError("TRL made other token ids than its rules say (docs/compare_with_trl.md)")
    if arguments.store:
        store(arguments.case, spec, side)
    return side.steps


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), default="hh-small")
    parser.add_argument("--data", type=Path, default=sides.default_data(), help="JSONL of pairs (default: %(default)s)")
    parser.add_argument("--layouts", default="one,tp2pp2", help=f"comma-separated, of {', '.join(LAYOUTS)}")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--stored", action="store_true", help=f"compare with {STORED.name} instead of running TRL")
    parser.add_argument("--store", action="store_true", help=f"write TRL's figures to {STORED.name}")
    parser.add_argument("--out", type=Path, help="also write both sides' steps to this JSON file")
    options = parser.parse_args(arguments)
    options.layouts = [name for name in options.layouts.split(",") if name]
    unknown = set(options.layouts) - set(LAYOUTS)
    if unknown or (options.stored and options.store):
        parser.error(
            f"no such layout: {', '.join(sorted(unknown))}" if unknown else "--stored and --store exclude each other"
        )
    return options


def run_case(options: argparse.Namespace, case: Case) -> tuple[bool, dict[str, list[dict[str, float]]]]:
    """Prints every layout's table; returns whether all figures fit, and everybody's steps."""
    good, written = True, {}
    with tempfile.TemporaryDirectory(prefix="megadpo-parity-") as name:
        spec = prepare(case, options.data, Path(name))
        written["TRL"] = theirs = their_side(options, spec)
        for layout_name in options.layouts:
            layout = LAYOUTS[layout_name]
            overrides = case.overrides + case.lora_overrides(spec.adapter)
            side = sides.run_ours(spec, layout, longest=LONGEST_TOKENS, overrides=overrides)
            written[layout_name] = side.steps
            lines, fits = compare(theirs, side.steps, case.names)
            print(f"\n{options.case}, {layout}:", *lines, sep="\n", flush=True)
            good &= fits
    return good, written


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    case = CASES[options.case]
    if not case.made and not options.data.exists():
        print(f"no such file: {options.data}; name one with --data, or its folder with MEGADPO_DATA", file=sys.stderr)
        return 2
    try:
        good, written = run_case(options, case)
    except (sides.RunFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print("\nevery figure within its tolerance" if good else "\nBEYOND its tolerance: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
