#!/usr/bin/env bash
# The ways to name a core, one after the other over a plain veth pair, both directions in the same mode, both ends on this
# machine; prints each run and a table of medians.
#   bench/steering.sh               SECONDS_PER_RUN=5 RUNS=3
# tcp1, tcp16: Gbit/s of one and of sixteen TCP streams. udp64: thousand datagrams of 64 bytes a second that arrive, eight flows.
# ring: packets handed to another core, percent of all that were read, over the whole run, both ends. late: datagrams of the UDP
# flows that came after a later one, per million. cpu: seconds of both programs per gigabyte of one TCP stream. first: median round
# trip of the first packet of a new flow, milliseconds, of 20.
. "$(dirname "$0")/lib.sh"
need ip iperf3 python3 ping
build
modes=(core-id receiver-assigned per-tunnel sealed-core-id sealed-header receiver-decides session-id)

# cpu → CPU seconds of both programs so far
cpu() {
  local ticks=0 pid
  for pid in $(ip netns pids $a; ip netns pids $b); do
    [ "$(cat "/proc/$pid/comm")" = anabranch ] || continue
    ticks=$((ticks + $(awk '{print $14 + $15}' "/proc/$pid/stat")))
  done
  python3 -c "import os; print($ticks / os.sysconf('SC_CLK_TCK'))"
}

# rings → percent of the packets read that changed core, both ends
rings() {
  for n in a b; do ip netns exec "${!n}" "$anabranch" status --socket "$work/$n.sock" --json; done | python3 -c '
import json, sys
text, at, crossed, read = sys.stdin.read(), 0, 0, 0
while at < len(text.rstrip()):
    report, at = json.JSONDecoder().raw_decode(text, at)
    while at < len(text) and text[at].isspace(): at += 1
    crossed += report["cross_core_packets"]; read += report["packets_read"]
print("%.2f" % (100 * crossed / max(read, 1)))'
}

# udp → thousand datagrams a second, and late ones per million
udp() {
  ip netns exec $a iperf3 -c "$peer" -p 5300 -t "$seconds" -u -b 0 -l 64 -P 8 -J | python3 -c '
import json, sys
end = json.load(sys.stdin)["end"]
total = end["sum"]
arrived = total["packets"] - total["lost_packets"]
late = sum(stream["udp"].get("out_of_order", 0) for stream in end["streams"])
print("%.1f %.0f" % (arrived / total["seconds"] / 1e3, 1e6 * late / max(arrived, 1)))'
}

# first → median round trip of 20 first packets
first() {
  for _ in $(seq 20); do ip netns exec $a ping -c1 -W2 "$peer" | sed -n 's/.*time=\([0-9.]*\) ms/\1/p'; done |
    sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'
}

for run in $(seq "${RUNS:-3}"); do
  for mode in "${modes[@]}"; do
    pair; PEER_EXTRA="steering = \"$mode\"" start_anabranch
    f=$(first); before=$(cpu); t1=$(tcp); after=$(cpu); t16=$(tcp -P 16); read -r u late <<<"$(udp)"; r=$(rings)
    c=$(python3 -c "print('%.2f' % (($after - $before) / max($t1 * $seconds / 8, 1e-9)))")
    echo "run $run $mode: tcp1 $t1 tcp16 $t16 Gbit/s, udp64 $u kpps, ring $r %, late $late, cpu $c s/GB, first $f ms" >&2
    echo "$mode $t1 $t16 $u $r $late $c $f" >>"$work/results"
  done
done
python3 - "$work/results" <<'P'
import statistics, sys
rows = [line.split() for line in open(sys.argv[1])]
print("| mode | tcp1 Gbit/s | tcp16 Gbit/s | udp64 kpps | ring % | late / million | cpu s/GB | first ms |")
print("|---|---|---|---|---|---|---|---|")
for mode in dict.fromkeys(row[0] for row in rows):
    columns = zip(*([float(value) for value in row[1:]] for row in rows if row[0] == mode))
    print("| `%s` | " % mode + " | ".join("%g" % statistics.median(column) for column in columns) + " |")
P
