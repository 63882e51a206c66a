#!/usr/bin/env bash
# What a hub adds to the bond: a branch reaches the hub's host, and a server behind the hub by NAT, by a virtual server and by a
# route, in turns. One and sixteen TCP streams in both directions, UDP floods of one and sixteen flows with 64 bytes each, and the share of packets that
# the hub hands from core to core after the first second of each flow.
#
# "kernel" is the same bond where the hub's kernel forwards and masquerades: what the way behind the hub costs on this machine.
#
#   branch 192.0.2.1 ══ bond ══ 192.0.2.2 hub 10.1.2.1 ── 10.1.2.2 server
#
#   bench/hub.sh            SECONDS_PER_RUN=5 RUNS=3 WAYS="alone kernel nat server routed" ANA=path
#
# Goals, as ratios to the bond alone of the same run: tcp ≥ 0.95, udp ≥ 0.9; handed over ≤ 0.1 %. Exits 1 when one is missed.
# Super-packets count as their segments where they are read from TUN and once where they are read from an interface.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/gateway-lib.sh"
need ip iperf3 python3 ping cc nft
build; build_flooder
s=abench-s-$$
ways=${WAYS:-alone kernel nat server routed}

stop_scene() {
  for ns in $a $b $s; do for pid in $(ip netns pids "$ns" 2>/dev/null); do kill "$pid" 2>/dev/null || true; done; done
  sleep 0.3
  for ns in $a $b $s; do ip netns del "$ns" 2>/dev/null || true; done
}
trap 'stop_scene; sleep 0.3; rm -rf "$work"' EXIT

# The two ends of the bond and, behind the hub, the server.
scene() {
  stop_scene; pair
  ip netns add $s; ip -n $s link set lo up
  ip link add "es$$" type veth peer name "eo$$"
  ip link set "es$$" netns $s name eth0; ip link set "eo$$" netns $b name out
  ip -n $s addr add 10.1.2.2/24 dev eth0; ip -n $b addr add 10.1.2.1/24 dev out
  ip -n $s link set eth0 up; ip -n $b link set out up
}

# hub WAY → the hub's sections besides node, tun and peer
hub() {
  case $1 in alone | kernel) return ;; esac
  printf '[gateway]\ndefault-action = "allow"\n[[interface]]\nname = "out"\n'
  case $1 in
    nat) printf '[[nat]]\nout = "out"\n' ;;
    server)
      for protocol in tcp udp; do
        printf '[[virtual-server]]\nname = "%s"\nlisten = "%s 10.1.9.10:5300"\nbackends = ["10.1.2.2:5300"]\n' $protocol $protocol
      done ;;
  esac
}

# start WAY: both gateways; $peer is what the branch talks to.
start() {
  for n in a b; do [ -f "$work/$n.key" ] || (umask 077; "$anabranch" genkey >"$work/$n.key"); done
  cat >"$work/a.toml" <<T
[node]
name = "branch"
private-key-file = "$work/a.key"
control-socket = "$work/a.sock"
state-dir = "$work/state-a"
[tun]
name = "ana0"
address = ["10.77.0.1/24"]
[[peer]]
name = "hub"
public-key = "$("$anabranch" pubkey <"$work/b.key")"
endpoints = ["192.0.2.2:4600"]
allowed-ips = ["10.77.0.2/32", "10.1.2.0/24", "10.1.9.0/24"]
T
  cat >"$work/b.toml" <<T
[node]
name = "hub"
private-key-file = "$work/b.key"
listen = 4600
control-socket = "$work/b.sock"
state-dir = "$work/state-b"
[tun]
name = "ana0"
address = ["10.77.0.2/24"]
[[peer]]
name = "branch"
public-key = "$("$anabranch" pubkey <"$work/a.key")"
allowed-ips = ["10.77.0.1/32"]
$(hub "$1")
T
  ip netns exec $b "$anabranch" up "$work/b.toml" >"$work/b.log" 2>&1 &
  ip netns exec $a "$anabranch" up "$work/a.toml" >"$work/a.log" 2>&1 &
  wait_for 10.77.0.2
  case $1 in
    alone) peer=10.77.0.2 far=$b; ip netns exec $b iperf3 -s -D -p 5300 >/dev/null; sleep 0.3; return ;;
    nat) peer=10.1.2.2 far=$s ;;
    kernel)
      peer=10.1.2.2 far=$s; ip netns exec $b sysctl -qw net.ipv4.ip_forward=1
      ip netns exec $b nft 'table ip nat { chain out { type nat hook postrouting priority 100; oifname "out" masquerade; }; }' ;;
    server) peer=10.1.9.10 far=$s ;;
    routed) peer=10.1.2.2 far=$s; ip -n $s route add 10.77.0.0/24 via 10.1.2.1 ;;
  esac
  ip netns exec $s iperf3 -s -D -p 5300 >/dev/null
  for _ in $(seq 100); do ip netns exec $a iperf3 -c "$peer" -p 5300 -n 1K --connect-timeout 500 >/dev/null 2>&1 && return; sleep 0.1; done
  echo "bench: no way through the hub ($1)" >&2; tail -n 5 "$work"/*.log >&2 || true; exit 1
}

hub_status() { ip netns exec $b "$anabranch" status --json --socket "$work/b.sock" >"$work/$1.json"; }

# share → percent of the packets read between the two statuses that went from core to core
share() {
  python3 - "$work/before.json" "$work/after.json" <<'P'
import json, sys
def counts(path):
    status = json.load(open(path))
    gateway = status.get("gateway") or {}
    read = status["packets_read"] + sum(core["rx_packets"] for core in gateway.get("cores", []))
    return status["cross_core_packets"], read
(handed_before, read_before), (handed, read) = map(counts, sys.argv[1:])
print("%.3f" % (100 * (handed - handed_before) / max(read - read_before, 1)))
P
}

# measure tcp ARGS…   → "figure share": Gbit/s at the receiver; the hub's share from the second second on
# measure udp FLOWS   → the same in kpps, datagrams of 64 bytes of payload
measure() {
  local kind=$1 client receiver; shift
  # iperf3's server closes its listener after each test and opens it anew: who comes in between is refused.
  sleep 0.5
  if [ "$kind" = tcp ]; then
    ip netns exec $a iperf3 -c "$peer" -p 5300 -t "$seconds" -O 1 -J "$@" >"$work/iperf.json" & client=$!
  else
    ip netns exec "$far" "$work/flood" receive 5300 "$(python3 -c "print($seconds+3)")" >"$work/received" & receiver=$!
    sleep 0.5
    ip netns exec $a "$work/flood" send "$peer" 5300 "$1" "$(python3 -c "print($seconds+1)")" 64 >"$work/sent" & client=$!
  fi
  sleep 1; hub_status before
  wait $client || { echo "bench: $kind $* failed: $(tail -c 300 "$work/iperf.json")" >&2; exit 1; }
  hub_status after
  if [ "$kind" = tcp ]; then
    python3 - "$work/iperf.json" <<'P'
import json, sys
report = json.load(open(sys.argv[1]))
if "error" in report or "sum_received" not in report["end"]: sys.exit("bench: iperf3: %s" % report.get("error", list(report["end"])))
print("%.3f" % (report["end"]["sum_received"]["bits_per_second"] / 1e9))
P
  else
    wait $receiver; awk '{printf "%.1f\n", $1 / 1000}' "$work/received"
  fi
  share
}

echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $("$anabranch" --version): SECONDS_PER_RUN=$seconds RUNS=${RUNS:-3} bench/hub.sh"
flows="tcp1:tcp: tcp16:tcp:-P,16 tcp1_reverse:tcp:-R tcp16_reverse:tcp:-P,16,-R udp64_1flow:udp:1 udp64_16flows:udp:16"
for run in $(seq "${RUNS:-3}"); do
  for way in $ways; do
    scene; start "$way"
    for flow in $flows; do
      IFS=: read -r name kind arguments <<<"$flow"
      # shellcheck disable=SC2086 # words on purpose
      set -- $(measure "$kind" ${arguments//,/ })
      [ $# = 2 ] || exit 1
      echo "{\"run\": $run, \"way\": \"$way\", \"flow\": \"$name\", \"figure\": $1, \"handed_over_percent\": $2}" | tee -a "$work/results"
    done
  done
done
python3 - "$work/results" <<'P'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
median = lambda way, flow, key: statistics.median([r[key] for r in rows if (r["way"], r["flow"]) == (way, flow)])
ways, flows = (list(dict.fromkeys(r[key] for r in rows)) for key in ("way", "flow"))
missed = []
for way in ways:
    line = {"median": way}
    for flow in flows:
        unit, goal = ("kpps", 0.9) if flow.startswith("udp") else ("gbps", 0.95)
        line[f"{flow}_{unit}"] = median(way, flow, "figure")
        handed = line[f"{flow}_handed_over_percent"] = median(way, flow, "handed_over_percent")
        if handed > 0.1: missed.append(f"{way} {flow}: {handed} % handed over, goal ≤ 0.1")
        if way != "alone" and "alone" in ways:
            # Ratios of the same run, since machines are noisy.
            ratios = [r["figure"] / max(t["figure"], 1e-9) for r in rows for t in rows
                      if (r["way"], r["flow"], t["way"], t["flow"], t["run"]) == (way, flow, "alone", flow, r["run"])]
            ratio = line[f"{flow}_ratio"] = round(statistics.median(ratios), 3)
            if ratio < goal: missed.append(f"{way} {flow}: {ratio} of the bond alone, goal ≥ {goal}")
    print(json.dumps(line))
print("# goals: tcp ≥ 0.95 and udp ≥ 0.9 of the bond alone, handed over ≤ 0.1 %: " + ("all met" if not missed else "MISSED"))
for line in missed: print("#   " + line)
sys.exit(1 if missed else 0)
P
