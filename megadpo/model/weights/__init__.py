"""Weights between Hugging Face folders, megatron-core models and megatron-core checkpoints."""

from megadpo.model.weights.convert import (
    HF_FOLDER,
    INFO_FILE,
    MODEL_FOLDER,
    copy_hf_files,
    dtype_named,
    export_hf,
    import_hf,
    is_megatron_folder,
    linked_out,
    write_info,
)
from megadpo.model.weights.hub import push_to_hub
from megadpo.model.weights.load import load_hf_weights

__all__ = [
    "HF_FOLDER",
    "INFO_FILE",
    "MODEL_FOLDER",
    "copy_hf_files",
    "dtype_named",
    "export_hf",
    "import_hf",
    "is_megatron_folder",
    "linked_out",
    "load_hf_weights",
    "push_to_hub",
    "write_info",
]
