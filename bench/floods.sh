#!/usr/bin/env bash
# Floods of SYNs, fragments, pings, ICMP errors, unresolved neighbors and handshakes at a gateway with a NAT, a port forward and a tunnel's
# port, beside 50 established UDP flows (1,000 datagrams a second there and back). First at half of what the datapath forwards in this run,
# then as fast as the sender can, and the same against the kernel's own forwarding and translation (nftables). A JSON line for each.
#   bench/floods.sh            SECONDS_PER_RUN=60; KINDS="syn fragment …"; HALF= or FULL= empty leaves those out
# Goals: at half < 1 % lost; at full no more than the kernel loses + 1 point; memory within 32 MiB, the control socket within 100 ms,
# nothing lost from a second after it on. Exits 1 when one is missed.
. "$(dirname "$0")/lib.sh"
need ip nft python3 ping cc
build
seconds=${SECONDS_PER_RUN:-60}
kinds=${KINDS:-syn fragment echo icmp neighbor handshake}
outer=10.2.0 outer_bits=16 # neighbors that are not there
. "$(dirname "$0")/gateway-lib.sh"
: >"$work/handshake"
cc -O2 -o "$work/floods" "$here/bench/floods.c"
gateway=
stop_scene() {
  if [ -n "$gateway" ]; then kill "$gateway" 2>/dev/null || true; wait "$gateway" 2>/dev/null || true; gateway=; fi
  stop_gateway_scene
}
trap 'stop_scene; stop_all; rm -rf "$work"' EXIT
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): SECONDS_PER_RUN=$seconds bench/floods.sh; load $(cut -d' ' -f1-3 /proc/loadavg)"

# Made-up sources are behind the server.
scene() { # anabranch | kernel
  stop_scene
  gateway_scene
  ip -n $g route add default via $outer.2
  if [ "$1" = kernel ]; then
    ip netns exec $g sysctl -qw net.ipv4.ip_forward=1
    ip netns exec $g nft 'table ip n { chain pre { type nat hook prerouting priority dstnat; iifname "wan" tcp dport 80 dnat to 10.1.1.2:80; };
      chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; };
      chain strangers { type filter hook forward priority 0; iifname "wan" ct state new ct status != dnat drop; }; }'
  else
    (umask 077; "$anabranch" genkey >"$work/hub.key"; "$anabranch" genkey >"$work/other.key")
    cat >"$work/gateway.toml" <<T
[node]
name = "gw"
listen = 4600
private-key-file = "$work/hub.key"
control-socket = "$work/gw.sock"
state-dir = "$work/state"
[[interface]]
name = "lan"
[[interface]]
name = "wan"
[[nat]]
out = "wan"
[[forward]]
listen = "tcp 10.2.0.1:80"
to = "10.1.1.2:80"
[tun]
name = "ana0"
address = ["10.77.0.1/24"]
[[peer]]
name = "other"
public-key = "$("$anabranch" pubkey <"$work/other.key")"
allowed-ips = ["10.77.0.2/32"]
T
    ip netns exec $g "$anabranch" up "$work/gateway.toml" >"$work/gw.log" 2>&1 &
    gateway=$!
  fi
  # Nobody answers the SYNs: answers would be a second flood, through the gateway.
  ip netns exec $c nft 'table inet quiet { chain in { type filter hook input priority 0; tcp dport 80 drop; }; }'
  ip netns exec $s "$work/floods" echo 9 & sleep 0.1
  for _ in $(seq 100); do ip netns exec $c ping -c1 -W1 10.2.0.2 >/dev/null 2>&1 && return; sleep 0.1; done
  echo "bench: no way through" >&2; tail -n 5 "$work/gw.log" >&2; exit 1
}

# A handshake of somebody unknown, well made for this gateway: what a dialer sends first.
handshake() {
  (umask 077; "$anabranch" genkey >"$work/stranger.key")
  cat >"$work/stranger.toml" <<T
[node]
name = "stranger"
private-key-file = "$work/stranger.key"
control-socket = "$work/stranger.sock"
state-dir = "$work/stranger"
[tun]
name = "ana0"
address = ["10.78.0.1/24"]
[[peer]]
name = "gw"
public-key = "$("$anabranch" pubkey <"$work/hub.key")"
endpoints = ["10.2.0.2:4601"]
allowed-ips = ["10.78.0.2/32"]
T
  timeout 5 ip netns exec $s "$anabranch" up "$work/stranger.toml" >"$work/stranger.log" 2>&1 & local dialer=$!
  ip netns exec $s timeout 5 python3 -c "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('10.2.0.2', 4601))
open('$work/handshake', 'wb').write(s.recv(2000))"
  kill $dialer; wait $dialer 2>/dev/null || true
}

flood() { # kind, rate, seconds
  local from=$s mac way=wan source=10.2.0.2 target=10.2.0.1 port=80
  case $1 in
    neighbor) from=$c; way=lan; source=10.1.1.3; target=10.2.0.0 ;;
    udp) from=$c; way=lan; source=10.1.1.3; target=10.2.0.2; port=7 ;;
    handshake) port=4600 ;;
    icmp|echo) port=0 ;;
  esac
  mac=$(ip -n $g -o link show $way | sed 's/.*ether \([0-9a-f:]*\).*/\1/')
  ip netns exec $from "$work/floods" send "$1" eth0 "$mac" $source $target $port "$2" "$3" "$work/handshake"
}

rss() { awk '/VmRSS/ {print $2}' "/proc/$1/status"; }

run() { # way, kind, rate
  local way=$1 kind=$2 rate=$3 before=0 middle=0 after=0 slowest=0 began took
  scene "$way"
  [ "$kind" != handshake ] || [ "$way" = kernel ] || handshake
  [ "$way" = kernel ] || before=$(rss $gateway)
  rm -f "$work/established"
  ip netns exec $c "$work/floods" probe 10.2.0.2 9 1000 "$((seconds + 3))" "$work/established" >"$work/probe" & local probe=$!
  for _ in $(seq 50); do [ -e "$work/established" ] && break; sleep 0.05; done
  [ -e "$work/established" ] || { echo "bench: nothing is answered before the flood" >&2; exit 1; }
  flood "$kind" "$rate" "$seconds" >"$work/sent" & local sender=$!
  if [ "$way" = anabranch ]; then
    for at in $(seq 5); do
      sleep "$(python3 -c "print($seconds / 6)")"
      took=$(python3 - "$work/gw.sock" <<'P'
import socket, sys, time
begin = time.monotonic()
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'{"command":"status"}\n')
while s.recv(1 << 16): pass
print(round((time.monotonic() - begin) * 1e3))
P
)
      [ "$took" -le "$slowest" ] || slowest=$took
      [ "$at" != 2 ] || middle=$(rss $gateway)
    done
    after=$(rss $gateway)
  fi
  wait $sender; wait $probe
  read -r sent lost gap late <"$work/probe"
  echo "{\"way\": \"$way\", \"kind\": \"$kind\", \"rate\": $rate, \"flood_pps\": $(cat "$work/sent"), \"sent\": $sent, \"lost\": $lost, \"lost_percent\": $(python3 -c "print(round(100*$lost/$sent, 3))"), \"gap_ms\": $gap, \"lost_after_1s\": $late, \"rss_before_kb\": $before, \"rss_third_kb\": $middle, \"rss_end_kb\": $after, \"control_ms\": $slowest}" | tee -a "$work/all"
}

# What the datapath reads at most: 64 flows of 64-byte frames from the client, as fast as the sender can.
scene anabranch
counted() {
  "$anabranch" status --json --socket "$work/gw.sock" | python3 -c '
import json, sys
print(sum(interface["rx_packets"] for interface in json.load(sys.stdin)["gateway"]["interfaces"] if interface["name"] == "lan"))'
}
before=$(counted); flood udp 0 4 >"$work/sent"; sleep 1; after=$(counted)
read_pps=$(((after - before) / 4))
half=$((read_pps / 2))
echo "{\"datapath_reads_pps\": $read_pps, \"half\": $half}"
for kind in $kinds; do
  [ -z "${HALF-1}" ] || run anabranch "$kind" $half
  [ -z "${FULL-1}" ] || { run anabranch "$kind" 0; run kernel "$kind" 0; }
done
python3 - "$work/all" <<'P'
import json, sys
runs = [json.loads(line) for line in open(sys.argv[1])]
missed = []
for run in runs:
    if run["way"] == "kernel": continue
    name = f'{run["kind"]} at {"half" if run["rate"] else "full"}'
    if run["rate"] and run["lost_percent"] >= 1: missed.append(f'{name}: {run["lost_percent"]} % lost')
    if not run["rate"]:
        kernel = next(other for other in runs if other["way"] == "kernel" and other["kind"] == run["kind"])
        if run["lost_percent"] > kernel["lost_percent"] + 1: missed.append(f'{name}: {run["lost_percent"]} % lost, the kernel {kernel["lost_percent"]} %')
    if run["rss_end_kb"] - run["rss_third_kb"] > 32 << 10: missed.append(f'{name}: {run["rss_end_kb"] - run["rss_third_kb"]} kB more')
    if run["control_ms"] > 100: missed.append(f'{name}: the control socket took {run["control_ms"]} ms')
    if run["lost_after_1s"] > 10: missed.append(f'{name}: {run["lost_after_1s"]} lost from a second after it on')
print("goals reached" if not missed else "missed: " + "; ".join(missed))
sys.exit(bool(missed))
P
