#!/usr/bin/env bash
# The demo's three links (100 Mbit/s 10 ms, 50 Mbit/s 20 ms, 20 Mbit/s 40 ms with 0.1 % loss): goodput against the best link
# and against the ideal payload, gap at the cut, cross-core share.
#   bench/bond.sh [SECONDS=60]      RUNS=1
. "$(dirname "$0")/lib.sh"
need python3
build
for run in $(seq "${RUNS:-1}"); do
  "$anabranch" demo --json --seconds "${1:-60}" 2>/dev/null | python3 -c '
import json,sys
d=json.load(sys.stdin)
print("tcp1 %.1f Mbit/s = %.2f x best link (goal 1.25), %.1f %% of the ideal %.1f" % (d["tcp1_mbps"], d["tcp1_mbps"]/d["best_link_mbps"], 100*d["tcp1_mbps"]/d["ideal_mbps"], d["ideal_mbps"]))
print("tcp16 %.1f Mbit/s = %.1f %% of the ideal (goal 85)" % (d["tcp16_mbps"], 100*d["tcp16_mbps"]/d["ideal_mbps"]))
print("udp %.1f Mbit/s, %.2f %% lost" % (d["udp_mbps"], d["udp_loss_percent"]))
print("best link silent: longest gap %.0f ms; cross-core packets %d, flows split over cores %d" % (d["longest_gap_ms"], d["cross_core_packets"], d["flows_split_over_cores"]))'
done
