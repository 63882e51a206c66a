#!/usr/bin/env bash
# One path over a plain veth pair: Anabranch against gotatun 0.10.2 (and boringtun with BORINGTUN=path), in turns, both ends on
# this machine. Prints each run and the ratio of the medians.
#   bench/single-path.sh            SECONDS_PER_RUN=5 RUNS=3
# ONLY=anabranch leaves the others out.
# gotatun comes from: cargo install gotatun-cli --version 0.10.2 --locked   (GOTATUN=path if it is not on the PATH)
. "$(dirname "$0")/lib.sh"
need ip iperf3 python3 ping
if [ "${ONLY:-}" = anabranch ]; then
  build
  for run in $(seq "${RUNS:-3}"); do
    pair; start_anabranch
    echo "{\"run\": $run, \"tcp1_gbps\": $(tcp), \"tcp4_gbps\": $(tcp -P 4), \"tcp1_reverse_gbps\": $(tcp -R), \"udp64_kpps\": $(udp64)}"
  done
  exit
fi
need wg
gotatun=${GOTATUN:-$(command -v gotatun || true)}
[ -n "$gotatun" ] || { echo "bench: gotatun is missing: cargo install gotatun-cli --version 0.10.2 --locked" >&2; exit 2; }
build
declare -A result
for run in $(seq "${RUNS:-3}"); do
  pair; peer=192.0.2.2; serve; plain=$(tcp)
  pair; start_anabranch; t1=$(tcp); t4=$(tcp -P 4); rev=$(tcp -R); u=$(udp64)
  pair; start_wireguard "$gotatun" --disable-drop-privileges -f "{if}"; g1=$(tcp); g4=$(tcp -P 4); grev=$(tcp -R); gu=$(udp64)
  echo "run $run: plain veth $plain | anabranch tcp1 $t1 tcp4 $t4 reverse $rev Gbit/s udp64 $u kpps | gotatun tcp1 $g1 tcp4 $g4 reverse $grev Gbit/s udp64 $gu kpps"
  for k in t1 t4 rev u g1 g4 grev gu; do result[$k]="${result[$k]:-} ${!k}"; done
done
median() { tr ' ' '\n' <<<"${result[$1]}" | grep . | sort -n | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
echo "median: tcp1 $(median t1) vs $(median g1) Gbit/s = $(ratio "$(median t1)" "$(median g1)") x; tcp4 $(ratio "$(median t4)" "$(median g4)") x; reverse $(ratio "$(median rev)" "$(median grev)") x; udp64 $(median u) vs $(median gu) kpps = $(ratio "$(median u)" "$(median gu)") x"
