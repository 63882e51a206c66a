#!/usr/bin/env bash
# Cores of two nodes that seal, open and deliver packets in memory, in every way to name a core: one core, two of a node, and two loops that
# share nothing, in turns (`anabranch bench tunnel`). Goals: two cores 0.97 of two independent loops with core-id; two receiving cores
# 1.6 x one with receiver-decides, sixteen flows. Prints the program's own table for 64 and 1,400 bytes.
#   bench/tunnel.sh                 PACKETS=200000 RUNS=5
. "$(dirname "$0")/lib.sh"
build
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD)"
for bytes in 1400 64; do
  "$anabranch" bench tunnel --bytes "$bytes" --packets "${PACKETS:-200000}" --runs "${RUNS:-5}"
done
