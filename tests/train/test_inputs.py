"""What a run starts from: everything wrong with model folders, tokenizer and data is said at once."""

from __future__ import annotations

import pytest

from megadpo.config.load import load_config
from megadpo.config.problems import DataError, UserError
from megadpo.train.inputs import TRAIN, open_run_inputs
from tests.helpers.runs import make_config, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def problems_of(config, *overrides, **options):
    with pytest.raises(UserError) as refused:
        open_run_inputs(load_config(str(config), ["data.cache_dir=null", *overrides]), **options)
    return [problem.where for problem in refused.value.problems]


def test_the_sets_asked_for_are_opened(model, tmp_path):
    cfg = load_config(str(make_config(tmp_path, model)), ["data.cache_dir=null"])
    inputs = open_run_inputs(cfg)
    assert list(inputs.loaders) == [TRAIN, *(cfg.data.val_data_paths or {})]
    assert list(inputs.validation) == list(cfg.data.val_data_paths or {})
    assert inputs.reference == inputs.source and inputs.reference_arch == inputs.arch
    (name,) = inputs.validation
    assert list(open_run_inputs(cfg, sets=[name]).loaders) == [name]


def test_model_reference_and_data_are_refused_together(model, tmp_path):
    config = make_config(tmp_path, model)
    broken = ["dpo.reference.model_name=./no_reference", "data.train_data_path=nowhere.jsonl"]
    assert problems_of(config, *broken) == ["dpo.reference.model_name", "nowhere.jsonl"]


def test_rows_are_read_without_a_tokenizer_where_asked(model, tmp_path):
    config = make_config(tmp_path, model)
    broken = ["policy.model_name=./no_model", "data.train_data_path=nowhere.jsonl"]
    assert problems_of(config, *broken) == ["policy.model_name"]
    assert problems_of(config, *broken, thorough=True) == ["policy.model_name", "nowhere.jsonl"]


def test_weight_files_are_read_where_asked(tmp_path):
    config, folder = make_config(tmp_path, make_model(tmp_path / "model")), tmp_path / "model"
    (folder / "model.safetensors").write_bytes(b"cut short")
    open_run_inputs(load_config(str(config), ["data.cache_dir=null"]))
    assert str(folder) in problems_of(config, thorough=True)[0]


def test_data_alone_is_a_data_error(model, tmp_path):
    cfg = load_config(str(make_config(tmp_path, model)), ["data.cache_dir=null", "data.train_data_path=nowhere.jsonl"])
    with pytest.raises(DataError):
        open_run_inputs(cfg)
