# effreason on NVIDIA GPUs. docs/launch/containers.md
#
#   docker build --file containers/cuda.Dockerfile --tag effreason:cuda .
#
# JAX brings CUDA itself, so the base has none; the driver is the host's. EXTRA=cuda12 is for older drivers.
FROM python:3.12.11-slim-bookworm
ARG EXTRA=cuda13

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# First what is largest: this layer stays the same if only effreason changes.
WORKDIR /effreason
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "jax[$EXTRA]"

COPY . ./
RUN pip install --constraint constraints.txt ".[$EXTRA]" && rm -rf build \
    && useradd --create-home --uid 1000 effreason && mkdir /runs && chown effreason /runs

# The recipes are in configs/ of the working directory, runs belong into a volume at /runs.
USER 1000
ENTRYPOINT ["effreason"]
CMD ["--help"]
