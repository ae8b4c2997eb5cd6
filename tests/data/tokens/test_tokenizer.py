"""Loading a tokenizer, and what `policy.tokenizer.chat_template` means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadpo.config.problems import ConfigError
from megadpo.data.tokens.tokenizer import load_tokenizer, pad_token_id, require_eos, resolve_chat_template
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer


def test_a_saved_tokenizer_loads_with_its_ids(tmp_path: Path) -> None:
    saved = tiny_tokenizer(adds_bos=True, chat_template=CHATML)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("Human: hi")["input_ids"] == saved("Human: hi")["input_ids"]
    assert loaded.chat_template == CHATML


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(ConfigError, match=r"policy\.tokenizer\.name") as refused:
            load_tokenizer(name)
        assert name in str(refused.value) and "tokenizer.json" in refused.value.problems[0].fix


def test_a_tokenizer_without_eos_is_refused_with_the_fix(tmp_path: Path) -> None:
    tiny_tokenizer(has_eos=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"eos_token is not set.*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_tokenizers_folder_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks "Do you wish to run the custom code? [y/N]" where trust_remote_code isn't said."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(ConfigError, match=r"policy\.tokenizer\.name"):
        load_tokenizer(str(tmp_path))
    assert not asked and not (tmp_path / "ran").exists()


def test_padding_falls_back_to_eos() -> None:
    assert (require_eos(tiny_tokenizer()), pad_token_id(tiny_tokenizer())) == (1, 2)
    assert pad_token_id(tiny_tokenizer(has_pad=False)) == 1


def test_default_is_the_tokenizers_own_template_and_null_is_none() -> None:
    assert resolve_chat_template(tiny_tokenizer(chat_template=CHATML), "default") == CHATML
    assert resolve_chat_template(tiny_tokenizer(), "default") is None
    assert resolve_chat_template(tiny_tokenizer(chat_template=CHATML), None) is None


def test_a_template_may_be_text_a_file_or_one_of_several(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    assert resolve_chat_template(tokenizer, "{{ messages }}") == "{{ messages }}"
    file = tmp_path / "template.jinja"
    file.write_text(CHATML + "!", encoding="utf-8")
    assert resolve_chat_template(tokenizer, str(file)) == CHATML + "!"
    tokenizer.chat_template = {"tool_use": "{{ x }}", "default": "{{ y }}"}
    assert resolve_chat_template(tokenizer, "default") == "{{ y }}"


@pytest.mark.parametrize("setting", ["chatml", "/nowhere/template.jinja"])
def test_what_is_no_template_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.tokenizer\.chat_template"):
        resolve_chat_template(tiny_tokenizer(), setting)


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ x }}"}
    with pytest.raises(ConfigError, match="tool_use"):
        resolve_chat_template(tokenizer, "default")
