# Shared by the bench scripts: two network namespaces joined by a veth pair, iperf3 between them, JSON in, figures out.
# Sourced, not run. The program is ANA, or target/release/anabranch, which is built first. Needs root; each script names the
# programs that it needs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$here/target}
anabranch=${ANA:-$target/release/anabranch}
seconds=${SECONDS_PER_RUN:-5}
work=$(mktemp -d)
a=abench-a-$$ b=abench-b-$$

# need PROGRAM…: says what is missing, and the line that installs it on Debian.
need() {
  local tool missing=() packages=()
  for tool in "$@"; do
    command -v "$tool" >/dev/null && continue
    missing+=("$tool")
    case $tool in
      ip) packages+=(iproute2) ;; ping) packages+=(iputils-ping) ;; nft) packages+=(nftables) ;;
      wg) packages+=(wireguard-tools) ;; cc) packages+=(gcc libc6-dev) ;; *) packages+=("$tool") ;;
    esac
  done
  [ ${#missing[@]} = 0 ] && return
  echo "bench: missing: ${missing[*]}; install with: apt-get install -y --no-install-recommends ${packages[*]}" >&2
  exit 2
}
build() { [ -n "${ANA:-}" ] || (cd "$here" && cargo build --release --quiet --package anabranch); }

stop_all() {
  for ns in $a $b; do
    for pid in $(ip netns pids "$ns" 2>/dev/null); do kill "$pid" 2>/dev/null || true; done
  done
  sleep 0.3
  for ns in $a $b; do ip netns del "$ns" 2>/dev/null || true; done
}
trap 'stop_all; sleep 0.3; rm -rf "$work"' EXIT

# Two namespaces with 192.0.2.1 and .2 on an interface "wan" each.
pair() {
  stop_all
  ip netns add $a; ip netns add $b
  ip link add "ea$$" type veth peer name "eb$$"
  ip link set "ea$$" netns $a name wan; ip link set "eb$$" netns $b name wan
  ip -n $a addr add 192.0.2.1/24 dev wan; ip -n $b addr add 192.0.2.2/24 dev wan
  for ns in $a $b; do ip -n $ns link set lo up; ip -n $ns link set wan up; done
}

# Waits until $1 answers pings from namespace a.
wait_for() {
  for _ in $(seq 100); do ip netns exec $a ping -c1 -W1 "$1" >/dev/null 2>&1 && return; sleep 0.1; done
  echo "bench: $1 does not answer" >&2; tail -n 5 "$work"/*.log >&2 || true; exit 1
}

serve() { ip netns exec $b iperf3 -s -D -p 5300 >/dev/null; sleep 0.2; }

# tcp ARGS… → Gbit/s at the receiver
tcp() { ip netns exec $a iperf3 -c "$peer" -p 5300 -t "$seconds" -J "$@" | python3 -c 'import json,sys; print("%.3f" % (json.load(sys.stdin)["end"]["sum_received"]["bits_per_second"]/1e9))'; }

# udp64 → delivered kpps of a 64-byte flood
udp64() { ip netns exec $a iperf3 -c "$peer" -p 5300 -t "$seconds" -u -b 0 -l 64 -J | python3 -c 'import json,sys; d=json.load(sys.stdin)["end"]["sum"]; print("%.1f" % ((d["packets"]-d["lost_packets"])/d["seconds"]/1e3))'; }

# Starts two gateways over the pair; the far one is 10.77.0.2.
start_anabranch() {
  for n in a b; do (umask 077; "$anabranch" genkey >"$work/$n.key"); done
  cat >"$work/a.toml" <<T
[node]
name = "a"
private-key-file = "$work/a.key"
control-socket = "$work/a.sock"
state-dir = "$work/state-a"
[tun]
name = "ana0"
address = ["10.77.0.1/24"]
[[peer]]
name = "b"
public-key = "$("$anabranch" pubkey <"$work/b.key")"
endpoints = ["192.0.2.2:4600"]
allowed-ips = ["10.77.0.2/32"]
${PEER_EXTRA:-}
T
  cat >"$work/b.toml" <<T
[node]
name = "b"
private-key-file = "$work/b.key"
listen = 4600
control-socket = "$work/b.sock"
state-dir = "$work/state-b"
[tun]
name = "ana0"
address = ["10.77.0.2/24"]
[[peer]]
name = "a"
public-key = "$("$anabranch" pubkey <"$work/a.key")"
allowed-ips = ["10.77.0.1/32"]
${PEER_EXTRA:-}
T
  ip netns exec $b "$anabranch" up "$work/b.toml" >"$work/b.log" 2>&1 &
  ip netns exec $a "$anabranch" up "$work/a.toml" >"$work/a.log" 2>&1 &
  peer=10.77.0.2; wait_for $peer; serve
}

# start_wireguard COMMAND… ({if} becomes the interface name): a userspace WireGuard on both ends.
start_wireguard() {
  need wg
  local ka kb pa pb
  ka=$(wg genkey); kb=$(wg genkey); pa=$(wg pubkey <<<"$ka"); pb=$(wg pubkey <<<"$kb")
  for n in a b; do ip netns exec "${!n}" "${@//\{if\}/wg$n$$}" >"$work/wg$n.log" 2>&1 & done
  for _ in $(seq 50); do [ -S "/var/run/wireguard/wga$$.sock" ] && [ -S "/var/run/wireguard/wgb$$.sock" ] && break; sleep 0.1; done
  ip netns exec $a wg set "wga$$" private-key <(echo "$ka") listen-port 51820 peer "$pb" allowed-ips 0.0.0.0/0 endpoint 192.0.2.2:51820
  ip netns exec $b wg set "wgb$$" private-key <(echo "$kb") listen-port 51820 peer "$pa" allowed-ips 0.0.0.0/0 endpoint 192.0.2.1:51820
  ip -n $a addr add 10.78.0.1/24 dev "wga$$"; ip -n $b addr add 10.78.0.2/24 dev "wgb$$"
  ip -n $a link set "wga$$" mtu 1420 up; ip -n $b link set "wgb$$" mtu 1420 up
  peer=10.78.0.2; wait_for $peer; serve
}

ratio() { python3 -c "print('%.2f' % ($1/max($2,1e-9)))"; }
