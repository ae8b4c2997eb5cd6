"""Packaging of megadpo. Ranges here, exact versions in constraints.txt: pip install -e '.[dev]' -c constraints.txt"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "megadpo/__init__.py").read_text(), re.MULTILINE)
README = HERE / "README.md"
assert VERSION is not None

setup(
    name="megadpo",
    version=VERSION[1],
    description="Direct Preference Optimization on tensor- and pipeline-parallel models, built on megatron-core",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ and launch/ stay at the top of a checkout, where people look for them; a wheel has them inside the package,
    # beside the code that finds them (megadpo/config/shipped.py), wherever pip puts it.
    packages=[*find_packages(include=["megadpo", "megadpo.*"]), "megadpo.configs", "megadpo.launch"],
    package_dir={"megadpo.configs": "configs", "megadpo.launch": "launch"},
    package_data={
        "megadpo.config": ["*.yaml"],
        "megadpo.config.nemo_rl": ["keys.yaml"],
        "megadpo.configs": ["*.yaml", "*.jsonl", "losses/*.yaml"],
        "megadpo.launch": ["*.sh", "*.yaml"],
    },
    entry_points={"console_scripts": ["megadpo = megadpo.commands:main"]},
    install_requires=[
        # The lower bound has an alpha because NVIDIA's containers carry alphas, such as 2.11.0a0+eb65b36914.nv26.02.
        "torch>=2.11.0a0,<2.14",
        "megatron-core>=0.16.1,<0.20",  # on Python 3.10 and 3.11 pip takes 0.16: 0.17 needs 3.12
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "datasets>=4.7",  # Parquet, Arrow, CSV and the hub
        "zstandard>=0.22",  # .zst files
        "xxhash>=3.2",  # checksums of checkpoints
        "filelock>=3.13",  # one process of a machine tokenises, the others wait
        "httpx>=0.27",  # the client of `megadpo collect`
        "tenacity>=9.0",  # and its retries
        "huggingface-hub>=1.0",
        "jinja2>=3.1",  # chat templates
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "psutil>=5.9",  # megatron-core uses it where it writes checkpoints, and doesn't ask for it
        "rich>=13",
        "tensorboard>=2.16",
    ],
    extras_require={
        # Compiles against the torch that is there: pip install --no-build-isolation -e '.[gpu]' -c constraints.txt
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.11,<3", "nvidia-ml-py>=12.535"],
        "nvml": ["nvidia-ml-py>=12.535"],  # logger.monitor_gpus, where Transformer Engine is there already
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3.1,<4"],
        "report": ["matplotlib>=3.9"],  # megadpo pairs --report FILE.png, megadpo plot, megadpo profile
        # The peer in benchmarks and parity checks, used by nothing else.
        "trl": ['trl>=1.16,<1.17; python_version >= "3.11"'],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "mlflow-skinny>=3.1,<4",
            "mypy>=1.15",
            "peft>=0.21,<0.22",  # opens what LoRA runs export
            "pytest>=9",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            # Runs the head's GPU kernels in its interpreter. torch brings its own for CUDA, and none for CPUs.
            'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
            "types-PyYAML>=6.0",
            "wandb>=0.19",
        ],
    },
)
