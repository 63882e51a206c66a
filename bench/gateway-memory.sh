#!/usr/bin/env bash
# The gateway's engine in memory, without interfaces: packets and new flows a second, bytes a flow, two cores against two
# independent loops. Beside the packets of known flows stands the physical limit of the same run: random reads of as much memory,
# prefetched the same way; goal: 0.6 of it. Prints the program's own table and one JSON line. Then what ten million IPv4 NAT flows cost in all: the
# process's memory (VmRSS, and VmHWM on the way) before the first and after the last, flow table and NAT tables together. Goal: 1.3 GB.
#   bench/gateway-memory.sh            FLOWS=1000000 PACKETS=20000000 RUNS=3 MEMORY_FLOWS=10000000 (0: not that)
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
[ "${MEMORY_FLOWS:-}" != 0 ] || exit 0
set -- bench gateway --flows "${MEMORY_FLOWS:-10000000}" --packets 1000000 --only nat --without-limit --json
echo "# anabranch $*"
"$anabranch" "$@" | python3 -c '
import json, sys
row = json.load(sys.stdin)[0]
grown = row["resident_after_bytes"] - row["resident_before_bytes"]
table = row["flow_table_bytes"]
print(json.dumps({"flows": row["flows"], "grown_bytes": grown, "grown_at_most_bytes": row["resident_peak_bytes"] - row["resident_before_bytes"], "bytes_per_flow": round(grown / row["flows"], 1),
    "flow_table_bytes_per_flow": round(table / row["flows"], 1), "rest_bytes_per_flow": round((grown - table) / row["flows"], 2),
    "port_tables": row["port_tables"], "new_flows_per_s": round(row["new_flows_per_s"])}))
'
