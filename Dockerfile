# docker build -t megadpo .
#
# docs/container.md has the commands that run it. The image has Python 3.12, PyTorch 2.11, Transformer Engine and apex,
# compiled for each other. Model weights and data are mounted, never built in.
FROM nvcr.io/nvidia/pytorch:26.02-py3 AS base

# The image's own constraints would also hold back what megadpo needs newer; keep_image_packages.py keeps what matters.
ENV PIP_CONSTRAINT="" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/megadpo
COPY docker docker
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megadpo megadpo
COPY configs configs
COPY launch launch
RUN python3 docker/keep_image_packages.py constraints.txt > /tmp/constraints.txt \
    && python3 -c "import torch; print(torch.__version__)" > /tmp/torch_before \
    && pip install --constraint /tmp/constraints.txt --editable '.[wandb,mlflow,nvml]' \
    && python3 -c "import torch; print(torch.__version__)" | diff /tmp/torch_before -

COPY tools tools
COPY benchmarks benchmarks
COPY LICENSE ./

# Every import that a run makes, and every version; none needs a GPU.
RUN python3 docker/check_image.py && megadpo --help > /dev/null

# The tests, those without a GPU and those for one, in the image that runs. Built only with --target test.
FROM base AS test
RUN pip install --constraint /tmp/constraints.txt --editable '.[wandb,mlflow,nvml,dev]' \
    && python3 -c "import torch; print(torch.__version__)" | diff /tmp/torch_before -
COPY tests tests
COPY docs docs
COPY Dockerfile Makefile CONTRIBUTING.md ./
ENV OMP_NUM_THREADS=1
CMD ["python3", "-m", "pytest", "-m", "not slow and not layouts"]

FROM base AS run
# The user may write beside the code: results/, logs/, demo_run/.
RUN useradd --create-home --shell /bin/bash megadpo && chown megadpo /opt/megadpo
USER megadpo
