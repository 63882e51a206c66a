#!/usr/bin/env bash
# One path over a plain veth pair, both ends on this machine: Anabranch against the least that an encrypted tunnel has to do (a bare relay
# with the same cipher on one core, `anabranch bench relay`) and against gotatun 0.10.2, in turns; medians and ratios.
#   bench/relay.sh                  SECONDS_PER_RUN=4 RUNS=3
# tcp1: Gbit/s of one TCP stream. cpu: seconds of both programs per gigabyte of it. udp64: thousand datagrams of 64 bytes a second with at
# most 1 % lost, searched by halving. Goals: tcp1 0.85 of the relay, 6 x gotatun; udp64 1.3 x gotatun; cpu half of gotatun's.
# gotatun comes from: cargo install gotatun-cli --version 0.10.2 --locked   (GOTATUN=path if it is not on the PATH; GOTATUN=none: without)
. "$(dirname "$0")/lib.sh"
need ip iperf3 python3 ping
gotatun=${GOTATUN:-$(command -v gotatun || true)}
[ -n "$gotatun" ] || { echo "bench: gotatun is missing: cargo install gotatun-cli --version 0.10.2 --locked, or GOTATUN=none" >&2; exit 2; }
[ "$gotatun" = none ] || need wg
build

# start_relay ARGS…: a bare relay on both ends; the far one is 10.79.0.2.
start_relay() {
  ip netns exec $b "$anabranch" bench relay --tun relay0 --local 192.0.2.2:5000 --remote 192.0.2.1:5000 "$@" >"$work/relay-b.log" 2>&1 &
  ip netns exec $a "$anabranch" bench relay --tun relay0 --local 192.0.2.1:5000 --remote 192.0.2.2:5000 "$@" >"$work/relay-a.log" 2>&1 &
  for _ in $(seq 50); do ip -n $a link show relay0 >/dev/null 2>&1 && ip -n $b link show relay0 >/dev/null 2>&1 && break; sleep 0.1; done
  ip -n $a addr add 10.79.0.1/24 dev relay0; ip -n $b addr add 10.79.0.2/24 dev relay0
  for ns in $a $b; do ip -n $ns link set relay0 mtu 1400 gso_max_size 60000 up; done
  peer=10.79.0.2; wait_for $peer; serve
}

# cpu → CPU seconds of the programs between the namespaces so far
cpu() {
  local ticks=0 pid
  for pid in $(ip netns pids $a; ip netns pids $b); do
    case $(cat "/proc/$pid/comm") in anabranch | gotatun) ticks=$((ticks + $(awk '{print $14 + $15}' "/proc/$pid/stat"))) ;; esac
  done
  python3 -c "import os; print($ticks / os.sysconf('SC_CLK_TCK'))"
}

# arrives KPPS → percent lost at this rate, and thousand datagrams a second that arrived
arrives() {
  ip netns exec $a iperf3 -c "$peer" -p 5300 -t 2 -u -b "$(python3 -c "print(int($1 * 64 * 8 * 1000))")" -l 64 -J | python3 -c '
import json, sys
total = json.load(sys.stdin)["end"]["sum"]
print("%.2f %.1f" % (100 * total["lost_packets"] / max(total["packets"], 1), (total["packets"] - total["lost_packets"]) / total["seconds"] / 1e3))'
}

# udp64_search → the highest rate with at most 1 % lost
udp64_search() {
  local low=0 high=400 best=0 lost got
  for _ in $(seq 7); do
    local rate=$(((low + high) / 2))
    read -r lost got <<<"$(arrives "$rate")"
    if python3 -c "exit(not $lost <= 1)"; then
      low=$rate
      # A generator that cannot do more is the limit then.
      python3 -c "exit(not $got > $best)" && best=$got
      python3 -c "exit(not $got < 0.9 * $rate)" && break
    else
      high=$rate
    fi
  done
  echo "$best"
}

systems=(relay relay-chacha anabranch)
[ "$gotatun" = none ] || systems+=(gotatun)
for run in $(seq "${RUNS:-3}"); do
  for system in "${systems[@]}"; do
    pair
    case $system in
      relay) start_relay ;;
      relay-chacha) start_relay --chacha ;;
      anabranch) start_anabranch ;;
      gotatun) start_wireguard "$gotatun" --disable-drop-privileges -f "{if}" ;;
    esac
    before=$(cpu); t=$(tcp); after=$(cpu)
    c=$(python3 -c "print('%.2f' % (($after - $before) / max($t * $seconds / 8, 1e-9)))")
    u=$(udp64_search)
    echo "run $run $system: tcp1 $t Gbit/s, cpu $c s/GB, udp64 $u kpps" >&2
    echo "$system $t $c $u" >>"$work/results"
  done
done
python3 - "$work/results" <<'P'
import statistics, sys
rows = [line.split() for line in open(sys.argv[1])]
medians = {}
print("| | one TCP stream, Gbit/s | cpu, s/GB | UDP 64 B at ≤ 1 % loss, kpps |\n|---|---|---|---|")
for system in dict.fromkeys(row[0] for row in rows):
    medians[system] = [statistics.median(column) for column in zip(*([float(value) for value in row[1:]] for row in rows if row[0] == system))]
    print("| %s | %.2f | %.2f | %.0f |" % (system, *medians[system]))
own = medians["anabranch"]
for system, other in medians.items():
    if system != "anabranch":
        print("anabranch to %s: tcp1 %.2f, cpu %.2f, udp64 %.2f" % (system, *(mine / max(theirs, 1e-9) for mine, theirs in zip(own, other))))
P
