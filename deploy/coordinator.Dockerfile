# The coordinator and the client verbs: the binary `thaw`. From the repository's root:
#   docker build -f deploy/coordinator.Dockerfile -t thaw-coordinator:0.1.0 .
ARG RUST=1.95.0
ARG DEBIAN=bookworm

FROM rust:${RUST}-slim-${DEBIAN} AS build
# Debian's release is what is pinned; its packages follow its security updates.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ protobuf-compiler libprotobuf-dev && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN cargo build --locked --release -p thaw-coordinator --bin thaw

FROM debian:${DEBIAN}-slim
COPY --from=build /source/target/release/thaw /usr/local/bin/thaw
COPY LICENSE /usr/share/doc/thaw/
# By number, so that runAsNonRoot can be checked. It owns nothing: data lie on volumes.
USER 65532:65532
WORKDIR /tmp
EXPOSE 7070
ENTRYPOINT ["thaw"]
