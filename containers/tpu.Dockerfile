# effreason on TPUs. docs/launch/containers.md
#
#   docker build --file containers/tpu.Dockerfile --tag effreason:tpu .
#
# JAX brings libtpu; the container needs the devices of the host.
FROM python:3.12.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# First what is largest: this layer stays the same if only effreason changes.
WORKDIR /effreason
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "jax[tpu]"

COPY . ./
RUN pip install --constraint constraints.txt ".[tpu]" && rm -rf build \
    && useradd --create-home --uid 1000 effreason && mkdir /runs && chown effreason /runs

# The recipes are in configs/ of the working directory, runs belong into a volume at /runs.
USER 1000
ENTRYPOINT ["effreason"]
CMD ["--help"]
