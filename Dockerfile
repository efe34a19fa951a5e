# Two targets:
#
#   docker build --target cpu -t megatron_rl:cpu .      # a laptop: docker run --rm -it megatron_rl:cpu runs the example
#   docker build --target cuda -t megatron_rl:cuda .    # NVIDIA GPUs, Transformer Engine, Apex, vLLM beside it
#
# Both run as a user without rights in /opt/megatron_rl; runs and checkpoints belong on a volume, /workspace. Slow steps
# come first: a change of the code repeats only the last layer, a change of setup.py the installation of packages.

ARG CUDA_IMAGE=nvcr.io/nvidia/pytorch:26.03-py3
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------------------------------------------------------- CPU
FROM ${PYTHON_IMAGE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

RUN useradd --create-home --uid 10001 megatron && install -d -o megatron -g megatron /opt/megatron_rl /workspace
USER 10001
WORKDIR /opt/megatron_rl

# The version that tools/setup_venv.sh installs, in the build without CUDA's libraries.
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv .venv && .venv/bin/pip install --no-cache-dir "torch==${TORCH}" --index-url "${TORCH_INDEX}"

COPY --chown=megatron:megatron setup.py README.md ./
COPY --chown=megatron:megatron megatron_rl/__init__.py megatron_rl/
COPY --chown=megatron:megatron tools/setup_venv.sh tools/
RUN PIP_NO_CACHE_DIR=1 bash tools/setup_venv.sh .venv

COPY --chown=megatron:megatron . .
ENV PATH=/opt/megatron_rl/.venv/bin:${PATH} OMP_NUM_THREADS=1
CMD ["bash", "examples/countdown/run.sh"]

# --------------------------------------------------------------------------------------------------------------- CUDA
FROM ${CUDA_IMAGE} AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

RUN useradd --create-home --uid 10001 megatron && install -d -o megatron -g megatron /opt/megatron_rl /workspace

# Rollout servers (rollout.servers.python: /opt/vllm/bin/python) have a separate environment: vLLM pins its torch.
# The image's constraints are for the image's environment.
ARG VLLM=0.32.0
RUN python3 -m venv /opt/vllm && PIP_CONSTRAINT='' /opt/vllm/bin/pip install --no-cache-dir "vllm==${VLLM}"

# Apex is on no package index. Megatron-Core uses its fused kernels if present; INSTALL_APEX=0 leaves it out.
ARG INSTALL_APEX=1
ARG APEX=9e3568a
RUN if [ "${INSTALL_APEX}" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation --no-deps \
            "git+https://github.com/NVIDIA/apex@${APEX}"; \
    fi

WORKDIR /opt/megatron_rl
COPY --chown=megatron:megatron setup.py README.md ./
COPY --chown=megatron:megatron megatron_rl/__init__.py megatron_rl/
RUN pip install --no-cache-dir -e .

COPY --chown=megatron:megatron . .
USER 10001
ENV PYTHONUNBUFFERED=1
CMD ["bash"]
