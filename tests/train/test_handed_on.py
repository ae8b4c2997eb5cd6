"""An export is what was trained: tokenizer, chat template and EOS of the run, and a card of its own."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import metadata_load

import megadpo
from megadpo.config.load import load_config
from megadpo.data.tokens.tokenizer import load_tokenizer
from megadpo.model.weights import export_hf
from megadpo.train.handed_on import old_tokenizer_notes, own_files
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import VOCAB, make_config, make_model, train, train_and_read
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

TEMPLATE = CHATML.replace("<|im_start|>", "<s>")
BASE_CARD = """---
license: apache-2.0
base_model: someone/else
model-index:
- name: base
  results: []
---
# The base, 99.9% on everything
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With several EOS, and what a hub folder has beside a model."""
    folder = make_model(tmp_path_factory.mktemp("model") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 8], "bos_token_id": 9}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.6}))
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE").write_text("do what you like")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Another one: fewer merges, BOS before every text, and another EOS."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    made = tiny_tokenizer(vocab_size=VOCAB - 30, adds_bos=True)
    made.eos_token = "<pad>"
    made.save_pretrained(folder)
    return folder


def started(tmp_path, name, model, *, overrides=(), **policy):
    """A run of one step: what it printed, and its checkpoint."""
    folder = tmp_path / name
    folder.mkdir()
    saving = {"enabled": True, "checkpoint_dir": str(folder / "checkpoints")}
    sections = {"dpo": {"max_num_steps": 1}, "data": {"on_too_long": "drop"}}
    config = make_config(folder, model, policy=policy, checkpointing=saving, **sections)
    [(code, printed)] = run_distributed(train_and_read, 1, str(config), list(overrides), init_process_group=False)
    assert code == 0, printed
    return printed, folder / "checkpoints/step_1"


def fingerprint(checkpoint):
    return json.loads((checkpoint / "megadpo.json").read_text())["position"]["data_fingerprint"]


@pytest.mark.distributed
def test_an_export_has_the_tokenizer_template_and_eos_of_training(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"name": str(tokenizer), "chat_template": TEMPLATE}
    said, step = started(tmp_path, "first", model, tokenizer=settings)
    assert f"differs from {model} (tokenizer, chat template, EOS)" in said
    assert old_tokenizer_notes(step) == []
    exported = tmp_path / "exported"
    export_hf(step, exported)
    trained_with, found = AutoTokenizer.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(exported)
    text = "what is the sum of two and three? <|im_end|>\nzebra"
    assert found(text).input_ids == trained_with(text).input_ids
    assert found(text).input_ids != AutoTokenizer.from_pretrained(model)(text).input_ids
    assert found.chat_template == TEMPLATE
    assert found.eos_token_id == trained_with.eos_token_id == 2
    opened = AutoModelForCausalLM.from_pretrained(exported)
    assert opened.config.eos_token_id == 2 and opened.config.bos_token_id == 0
    end_of_turn = trained_with.convert_tokens_to_ids("<|im_end|>")
    assert opened.generation_config.eos_token_id == [end_of_turn, 2]
    assert opened.generation_config.temperature == 0.6
    # the next round starts from the checkpoint, or from its export, without a word about the tokenizer
    for number, start in enumerate((step, exported)):
        said, again = started(tmp_path, f"next{number}", start)
        assert fingerprint(again) == fingerprint(step) and "policy.tokenizer" not in said
    # one that names another than the checkpoint's says so
    said, again = started(tmp_path, "other", step, tokenizer={"name": str(model)})
    assert f"differs from {step}/hf (tokenizer, chat template, EOS)" in said
    assert fingerprint(again) != fingerprint(step)


@pytest.mark.distributed
def test_no_template_is_handed_on_too_and_own_ones_stay_bit_for_bit(model, tokenizer, tmp_path):
    (tmp_path / "chat").mkdir()
    chat = make_model(tmp_path / "chat/model")
    (chat / "chat_template.jinja").write_text(CHATML)
    (chat / "additional_chat_templates").mkdir()
    (chat / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    said, step = started(tmp_path, "plain", chat, tokenizer={"chat_template": None})
    assert f"differs from {chat} (chat template)" in said
    assert not (step / "hf/chat_template.jinja").exists()
    assert not (step / "hf/additional_chat_templates").exists()
    said, again = started(tmp_path, "again", step)
    assert fingerprint(again) == fingerprint(step)
    _, step = started(tmp_path, "own", model)
    for path in model.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "README.md":
            assert (step / "hf" / path.relative_to(model)).read_bytes() == path.read_bytes()


def test_further_ends_stay_where_the_ids_mean_the_same(tmp_path):
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 7]}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    cfg = load_config(make_config(tmp_path, model, policy={"tokenizer": {"chat_template": CHATML}}))
    tokenizer = load_tokenizer(str(model))
    files = own_files(cfg, model, tokenizer)
    assert json.loads(files["config.json"])["eos_token_id"] == [1, 7]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [7, 1, end_of_turn]


@pytest.mark.distributed
def test_the_card_is_the_trained_models(model, tmp_path):
    _, step = started(tmp_path, "first", model, overrides=["dpo.val_at_end=true"])
    export_hf(step, tmp_path / "exported")
    card = (tmp_path / "exported/README.md").read_text()
    about = metadata_load(tmp_path / "exported/README.md")
    assert "model-index" not in card and "99.9%" not in card
    assert about["license"] == "apache-2.0" and "base_model" not in about and about["library_name"] == "transformers"
    assert f"| base_model | {model} |" in card
    assert "40 rows, 40 pairs" in card and fingerprint(step) in card
    assert (
        "| loss | sigmoid, beta 0.1 |" in card and "| beta | 0.1 |" in card and "| steps | 1 of 1, 0 skipped |" in card
    )
    metrics = json.loads((step / "megadpo.json").read_text())["position"]["metrics"]
    assert f"| validation-held_out/loss | {metrics['validation-held_out/loss']:.6g} |" in card
    assert f"megadpo {megadpo.__version__}, torch " in card and "megatron-core 0." in card
    assert "megadpo train config.yaml --nproc-per-node 1" in card
    assert (tmp_path / "exported/README.base.md").read_text() == BASE_CARD
    assert (tmp_path / "exported/LICENSE").read_text() == "do what you like"
    # the config in it is the run's
    config = tmp_path / "config.yaml"
    config.write_text(card.split("```yaml\n")[1].split("```")[0])
    again = [f"checkpointing.checkpoint_dir={tmp_path}/more", f"logger.log_dir={tmp_path}/logs"]
    assert run_distributed(train, 1, str(config), again, init_process_group=False) == [0]
    assert fingerprint(tmp_path / "more/step_1") == fingerprint(step)
    # a second round keeps both cards of what it started from
    _, second = started(tmp_path, "second", tmp_path / "exported")
    assert (second / "hf/README.base.md").read_text() == card
    assert (second / "hf/README.base.base.md").read_text() == BASE_CARD
    assert metadata_load(second / "hf/README.md")["license"] == "apache-2.0"


@pytest.mark.parametrize("changes", [{"name": "other/tokenizer"}, {"chat_template": None}])
def test_a_checkpoint_that_may_have_another_tokenizer_than_training_says_so(tmp_path, changes):
    """One of a version that kept the starting model's, whatever the config set."""
    settings = {"name": "some/model", "chat_template": "default"}
    config = {"policy": {"model_name": "some/model", "tokenizer": settings}}
    (tmp_path / "megadpo.json").write_text(json.dumps({"format": 1}))
    assert old_tokenizer_notes(tmp_path) == [], "an imported model"
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert old_tokenizer_notes(tmp_path) == [], "trained with the model's own"
    settings.update(changes)
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    [note] = old_tokenizer_notes(tmp_path)
    assert all(repr(value) in note for value in settings.values())
    (tmp_path / "megadpo.json").write_text(json.dumps({"format": 1, "hf_tokenizer": "as trained"}))
    assert old_tokenizer_notes(tmp_path) == []
