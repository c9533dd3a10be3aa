#!/bin/sh
# Two nodes on one machine, for a look at live migration (docs/live-migration.md):
#
#     docs/two-nodes.sh n1 worker         in one terminal, first: it brings the broker and the database of both
#     docs/two-nodes.sh n2 worker         in another one
#     docs/two-nodes.sh n1 guest          in a third: a guest in 512 bytes, web1
#     docs/two-nodes.sh n1 migrate web1 --to n2
#
# Whatever follows the node's name is a command of hostler's. All of it is below TWO_NODES, /tmp/hst-two unless set.
set -eu
node=${1:-}
case $node in
n1 | n2) shift ;;
*) echo "usage: docs/two-nodes.sh n1|n2 guest|COMMAND..." >&2; exit 2 ;;
esac
place=$(realpath -m "${TWO_NODES:-/tmp/hst-two}")
cd "$(dirname "$0")/.."
python=${HOSTLER_DEV_VENV:-.venv}/bin/python
[ -x "$python" ] || { echo "there is no $python yet: ./dev setup" >&2; exit 1; }
unset TWO_NODES
export HOSTLER_NODE="$node" HOSTLER_STATE_DIR="$place/$node/state" HOSTLER_RUN_DIR="$place/$node/run"
export HOSTLER_MIGRATION_ADDRESS=127.0.0.1
export HOSTLER_BROKER_URL="redis+socket://$place/n1/state/broker/redis.sock?virtual_host=0"
export HOSTLER_RESULT_BACKEND="$HOSTLER_BROKER_URL"
export HOSTLER_DATABASE_URL="sqlite+pysqlite:///$place/n1/state/hostler.sqlite"
if [ "$node" = n1 ]; then # its own defaults are just these, and a worker with defaults starts the broker
    unset HOSTLER_BROKER_URL HOSTLER_RESULT_BACKEND HOSTLER_DATABASE_URL
fi
if [ "${1:-}" = guest ]; then
    mkdir -p "$place"
    [ -e "$place/web1.raw" ] || "$python" -m worker.kvm.tiny_guest "$place/web1.raw"
    cat >"$place/web1.yaml" <<YAML
name: web1
memory_mib: 128
disks: [{path: "$place/web1.raw"}]
hvparams: {disk_type: ide, serial_console: true}
YAML
    set -- start "$node" "$place/web1.yaml"
fi
exec "$python" -m hostler "$@"
