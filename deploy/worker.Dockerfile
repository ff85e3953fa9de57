# The worker: the binary `thaw-worker` with libtorch. From the repository's root:
#   docker build -f deploy/worker.Dockerfile -t thaw-worker:0.1.0 .
#   docker build -f deploy/worker.Dockerfile --build-arg VARIANT=cuda -t thaw-worker:0.1.0-cuda .
ARG RUST=1.95.0
ARG DEBIAN=bookworm

FROM rust:${RUST}-slim-${DEBIAN} AS build
# cpu, or cuda with the libraries that trainers on GPUs load.
ARG VARIANT=cpu
# Debian's release is what is pinned; its packages follow its security updates.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ protobuf-compiler libprotobuf-dev python3-pip && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /source
# First and alone, so that a change of the code does not fetch it again.
COPY deploy/libtorch.py deploy/link-libtorch.sh deploy/requirements.txt deploy/
RUN deploy/libtorch.py "${VARIANT}" /opt/libtorch && \
    deploy/link-libtorch.sh /opt/libtorch/torch /opt/libtorch-link "$(sed -n 's/^torch==//p' deploy/requirements.txt)"
ENV LIBTORCH=/opt/libtorch-link
COPY . .
RUN cargo build --locked --release -p thaw-worker --bin thaw-worker && \
    rm -rf /opt/libtorch/torch/include

FROM debian:${DEBIAN}-slim
# The path that the binary was linked for.
COPY --from=build /opt/libtorch /opt/libtorch
COPY --from=build /source/target/release/thaw-worker /usr/local/bin/thaw-worker
COPY LICENSE /usr/share/doc/thaw/
# What the container runtime brings along from the driver, where there is a GPU.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["thaw-worker"]
