#!/usr/bin/env bash
# A cluster's dispatcher in memory: key, bucket, encapsulation and the copy, beside the same copy with one random read of the table; the plan of
# one data plane more over 65,536 buckets. Goals: 80 ns a packet, or 1.5 times the copy with its read; plan in 10 ms.
#   bench/dispatch.sh            UNITS=250 RUNS=3 ANA=path
. "$(dirname "$0")/lib.sh"
build
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): UNITS=${UNITS:-250} bench/dispatch.sh"
for run in $(seq "${RUNS:-3}"); do
  echo "# run $run"
  "$anabranch" bench dispatch --units "${UNITS:-250}"
done
