#!/usr/bin/env bash
# Memory of a hub with 100 peers (PEERS) that are joined and idle.  bench/idle-hub.sh
. "$(dirname "$0")/lib.sh"
need ip python3
build
pair
n=${PEERS:-100}
hub=$work/hub.toml
(umask 077; "$anabranch" genkey >"$work/hub.key"); hubkey=$("$anabranch" pubkey <"$work/hub.key")
printf '[node]\nname = "hub"\nprivate-key-file = "%s"\nlisten = 4600\ncontrol-socket = "%s"\nstate-dir = "%s"\n[tun]\nname = "ana0"\naddress = ["10.77.0.1/16"]\n' "$work/hub.key" "$work/hub.sock" "$work/state" >"$hub"
for i in $(seq "$n"); do
  (umask 077; "$anabranch" genkey >"$work/p$i.key")
  printf '[[peer]]\nname = "p%d"\npublic-key = "%s"\nallowed-ips = ["10.77.%d.%d/32"]\n' "$i" "$("$anabranch" pubkey <"$work/p$i.key")" $((1+i/200)) $((1+i%200)) >>"$hub"
  printf '[node]\nname = "p%d"\nprivate-key-file = "%s"\ncores = 1\ncontrol-socket = "%s"\nstate-dir = "%s"\n[tun]\nname = "p%d"\naddress = ["10.77.%d.%d/32"]\n[[peer]]\nname = "hub"\npublic-key = "%s"\nendpoints = ["192.0.2.2:4600"]\nallowed-ips = ["10.77.0.1/32"]\n' \
    "$i" "$work/p$i.key" "$work/p$i.sock" "$work/state$i" "$i" $((1+i/200)) $((1+i%200)) "$hubkey" >"$work/p$i.toml"
done
ip netns exec $b "$anabranch" up "$hub" >"$work/hub.log" 2>&1 & pid=$!
sleep 1
for i in $(seq "$n"); do ip netns exec $a "$anabranch" up "$work/p$i.toml" >"$work/p$i.log" 2>&1 & done
for _ in $(seq 60); do
  up=$("$anabranch" status --socket "$work/hub.sock" --json 2>/dev/null | python3 -c 'import json,sys; print(sum(p["state"]=="up" for p in json.load(sys.stdin)["peers"]))' || echo 0)
  [ "$up" = "$n" ] && break; sleep 1
done
sleep 20
hubpid=$(pgrep -P $pid || echo $pid)
awk -v n="$n" -v up="$up" '/VmRSS/ {printf "hub with %d peers (%d up), idle: %.1f MB resident (goal 100 for 100 peers)\n", n, up, $2/1024}' "/proc/$hubpid/status"
