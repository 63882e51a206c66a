#!/usr/bin/env bash
# Which core reads a packet (row C8): all schemes over the same packets in memory, threads as cores, rings between them.
# Prints Mpps, packets handed to their owner, imbalance and reordering within flows. Nothing is sent.
#   bench/distribution.sh
. "$(dirname "$0")/lib.sh"
echo "# $(date -u +%FT%TZ) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): bench/distribution.sh"
cd "$here" && cargo run --release --quiet --package anabranch -- bench distribution
