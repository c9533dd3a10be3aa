# A node, or Flower, or the client: the same image. Guests run inside the container of their node.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv qemu-system-x86 qemu-utils iproute2 socat \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN python3 -m venv /opt/hostler \
    && /opt/hostler/bin/pip install --no-cache-dir '/src[flower,mariadb]' \
    && rm -rf /src
ENV PATH=/opt/hostler/bin:$PATH

VOLUME ["/var/lib/hostler", "/run/hostler"]
# A guest must outlive its worker: the worker is not the container's first process, and a stopped worker is restarted.
# Stopping the CONTAINER does end its guests; on a real node run the worker from systemd instead.
ENTRYPOINT ["hostler"]
CMD ["worker"]
