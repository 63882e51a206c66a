#!/usr/bin/env bash
# The gateway's engine in memory, without interfaces: packets and new flows a second, bytes a flow, two cores against two
# independent loops. Prints the program's own table and one JSON line.
#   bench/gateway-memory.sh            FLOWS=1000000 PACKETS=20000000 RUNS=3
. "$(dirname "$0")/lib.sh"
need python3
build
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD)"
for run in $(seq "${RUNS:-3}"); do
  set -- bench gateway --flows "${FLOWS:-1000000}" --packets "${PACKETS:-20000000}"
  echo "# run $run: anabranch $*"
  "$anabranch" "$@"
  "$anabranch" "$@" --json | python3 -c 'import json,sys; print(json.dumps(json.load(sys.stdin)))'
done
