# syntax=docker/dockerfile:1
# Trainer on the NGC PyTorch image, engines in an environment of their own.
#   docker build -t megatron_sod .                    the image
#   docker build -t megatron_sod:test --target test . the same, with its tests as a build step
# Versions and what was verified: docs/container.md
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3

FROM ${BASE_IMAGE} AS trainer
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# python3-venv must match the image's own Python, so it is not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron_sod
COPY requirements/ requirements/

# The image's constraint file pins its own torch, Transformer-Engine and apex.
RUN python3 -m pip install -r requirements/trainer.txt

# The engines' environment must not see those constraints: vLLM brings its own torch.
RUN python3 -m venv /opt/engine \
 && PIP_CONSTRAINT="" /opt/engine/bin/python -m pip install -r requirements/engine.txt

COPY . .

# The kernels are built once, for sm_80, sm_90 and sm_100, against the stable ABI; a build without
# them fails here and not in somebody's training run.
RUN python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && unzip -l dist/megatron_sod-*.whl | grep -q _sod_cuda \
 && python3 -m pip install --no-deps dist/megatron_sod-*.whl \
 && PIP_CONSTRAINT="" /opt/engine/bin/python -m pip install --no-deps dist/megatron_sod-*.whl

# The trainer and the engines run as a plain user; the sandbox drops further from there.
RUN useradd --create-home --uid 10001 sod && mkdir /runs && chown sod:sod /runs
ENV SOD_ENGINE_PYTHON=/opt/engine/bin/python

FROM trainer AS test
USER 10001
RUN OMP_NUM_THREADS=1 python3 -m pytest -p no:cacheprovider -q -m "not gpu and not slow and not dist" \
    tests/algorithm tests/config tests/convert tests/data tests/ops tests/test_configs.py tests/test_layers.py

FROM trainer AS runtime
USER 10001
VOLUME ["/runs"]
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
CMD ["python3", "tools/doctor.py"]
