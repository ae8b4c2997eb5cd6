# docker build -t megadpo .
# docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data megadpo \
#     torchrun --nproc-per-node 8 launch/train.py configs/dpo_megatron.yaml data.train_data_path=/data/pairs.jsonl
#
# The image has Python 3.12, PyTorch 2.11, Transformer Engine and apex, compiled for each other. Model weights and data
# are mounted, never built in.
FROM nvcr.io/nvidia/pytorch:26.02-py3

# The image's own constraints would also hold back what megadpo needs newer; keep_image_packages.py keeps what matters.
ENV PIP_CONSTRAINT="" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/megadpo
COPY docker/keep_image_packages.py docker/
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megadpo megadpo
RUN python3 docker/keep_image_packages.py constraints.txt > /tmp/constraints.txt \
    && python3 -c "import torch; print(torch.__version__)" > /tmp/torch_before \
    && pip install --constraint /tmp/constraints.txt --editable '.[wandb]' \
    && python3 -c "import torch; print(torch.__version__)" | diff /tmp/torch_before - \
    && rm /tmp/constraints.txt /tmp/torch_before

COPY launch launch
COPY tools tools
COPY configs configs
COPY LICENSE .

# Every import that a run makes; none needs a GPU.
RUN python3 launch/train.py --help > /dev/null \
    && python3 -c "import torch, megatron.core, transformers, megadpo.train.loop" \
    && python3 -c "from importlib.metadata import version; print({n: version(n) for n in ('torch', 'transformer_engine', 'megatron-core', 'transformers')})"

RUN useradd --create-home --shell /bin/bash megadpo && mkdir -p results logs && chown megadpo results logs
USER megadpo
