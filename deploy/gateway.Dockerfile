# syntax=docker/dockerfile:1
# The PACS gateway, for deploy/helm. Build context: the repository. Not run by the project: docs/kubernetes.md.
ARG IMAGE=docker.io/library/python
# Of 3.12-slim, as `docker buildx imagetools inspect` gives it: sha256:...
ARG DIGEST

FROM ${IMAGE}@${DIGEST} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS wheel
COPY . /source
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels /source

FROM base AS gateway
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install "$(echo /wheels/cxr_triton-*.whl)[gateway,trace]" \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin cxr
ENV HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 11112 8042
ENTRYPOINT ["cxr-triton", "gateway"]
CMD ["--config", "/etc/cxr-gateway/gateway.yaml"]
