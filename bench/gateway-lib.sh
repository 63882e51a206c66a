# Shared by the gateway's bench scripts: client – gateway – server in namespaces, and three ways to forward between them.
# Sourced after lib.sh. Needs root, iproute2, nftables, iperf3, python3, a C compiler.
c=agw-c-$$ g=agw-g-$$ s=agw-s-$$

stop_gateway_scene() {
  for ns in $c $g $s; do
    for pid in $(ip netns pids "$ns" 2>/dev/null); do kill "$pid" 2>/dev/null || true; done
  done
  sleep 0.3
  for ns in $c $g $s; do ip netns del "$ns" 2>/dev/null || true; done
}
trap 'stop_gateway_scene; stop_all; rm -rf "$work"' EXIT

# client 10.1.1.2 – lan 10.1.1.1 gateway $outer.1 wan – $outer.2 server
outer=${outer:-10.1.2} outer_bits=${outer_bits:-24}
gateway_scene() {
  stop_gateway_scene
  for ns in $c $g $s; do ip netns add "$ns"; ip -n "$ns" link set lo up; done
  ip link add "gc$$" type veth peer name "gl$$"; ip link add "gs$$" type veth peer name "gw$$"
  ip link set "gc$$" netns $c name eth0; ip link set "gl$$" netns $g name lan
  ip link set "gs$$" netns $s name eth0; ip link set "gw$$" netns $g name wan
  ip -n $c addr add 10.1.1.2/24 dev eth0; ip -n $g addr add 10.1.1.1/24 dev lan
  ip -n $s addr add $outer.2/$outer_bits dev eth0; ip -n $g addr add $outer.1/$outer_bits dev wan
  ip -n $c link set eth0 up; ip -n $s link set eth0 up; ip -n $g link set lan up; ip -n $g link set wan up
  ip -n $c route add default via 10.1.1.1; ip -n $s route add default via $outer.1
  ip netns exec $g sysctl -qw net.ipv4.ip_forward=0
}

# forward_with plain | masquerade | anabranch
forward_with() {
  case $1 in
    plain) ip netns exec $g sysctl -qw net.ipv4.ip_forward=1 ;;
    masquerade)
      ip netns exec $g sysctl -qw net.ipv4.ip_forward=1
      ip netns exec $g nft 'add table ip nat; add chain ip nat post { type nat hook postrouting priority srcnat; }; add rule ip nat post oifname "wan" masquerade' ;;
    anabranch)
      cat >"$work/gateway.toml" <<T
[node]
name = "gw"
control-socket = "$work/gw.sock"
state-dir = "$work/state"
[gateway]
default-action = "allow"
${GATEWAY_EXTRA:-}
[[interface]]
name = "lan"
[[interface]]
name = "wan"
[[nat]]
out = "wan"
${NAT_EXTRA:-}
T
      ip netns exec $g "$anabranch" up "$work/gateway.toml" >"$work/gw.log" 2>&1 & ;;
  esac
  for _ in $(seq 100); do ip netns exec $c ping -c1 -W1 $outer.2 >/dev/null 2>&1 && return; sleep 0.1; done
  echo "bench: no way through with $1" >&2; tail -n 5 "$work"/gw.log >&2 || true; exit 1
}

# A sender and a receiver of UDP datagrams, in C because they must not be what is measured.
build_flooder() {
  cat >"$work/flood.c" <<'C'
// flood send ADDRESS PORT FLOWS SECONDS BYTES | flood receive PORT SECONDS
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#define BATCH 64
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int main(int argc, char **argv) {
  static char data[BATCH][2048]; static struct mmsghdr m[BATCH]; static struct iovec v[BATCH];
  int send = argc > 1 && !strcmp(argv[1], "send");
  int bytes = send ? atoi(argv[6]) : 2048, flows = send ? atoi(argv[4]) : 1, fd[1024];
  double seconds = atof(argv[send ? 5 : 3]);
  for (int i = 0; i < BATCH; i++) { v[i].iov_base = data[i]; v[i].iov_len = bytes; m[i].msg_hdr.msg_iov = &v[i]; m[i].msg_hdr.msg_iovlen = 1; }
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[send ? 3 : 2]))};
  unsigned long count = 0;
  if (send) {
    inet_pton(AF_INET, argv[2], &to.sin_addr);
    for (int i = 0; i < flows; i++) { fd[i] = socket(AF_INET, SOCK_DGRAM, 0); if (connect(fd[i], (void *)&to, sizeof to)) return perror("connect"), 1; }
    double begin = now(), end = begin + seconds;
    for (int i = 0; now() < end; i = (i + 1) % flows) { int n = sendmmsg(fd[i], m, flows > 1 ? 16 : BATCH, 0); if (n > 0) count += n; }
    printf("%.0f\n", count / (now() - begin));
    return 0;
  }
  int one = 32 << 20; fd[0] = socket(AF_INET, SOCK_DGRAM, 0);
  setsockopt(fd[0], SOL_SOCKET, SO_RCVBUFFORCE, &one, sizeof one);
  struct timeval patience = {0, 200000}; setsockopt(fd[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  if (bind(fd[0], (void *)&to, sizeof to)) return perror("bind"), 1;
  double begin = 0, last = 0, end = now() + seconds;
  while (now() < end) { int n = recvmmsg(fd[0], m, BATCH, MSG_WAITFORONE, 0); if (n > 0) { if (!begin) begin = now(); last = now(); count += n; } }
  printf("%.0f\n", last > begin ? count / (last - begin) : 0.0);
  return 0;
}
C
  cc -O2 -o "$work/flood" "$work/flood.c"
}

# flood FLOWS → packets a second at the receiver, 64-byte frames (18 bytes of payload; 64 with the 4 bytes of the frame check)
flood() {
  ip netns exec $s "$work/flood" receive 9 "$(python3 -c "print($seconds+2)")" >"$work/received" & local receiver=$!
  sleep 0.5
  ip netns exec $c "$work/flood" send $outer.2 9 "$1" "$seconds" 18 >"$work/sent"
  wait $receiver
  cat "$work/received"
}

# bulk ARGS… → Gbit/s of iperf3 at the receiver
bulk() {
  ip netns exec $s iperf3 -s -1 -p 5300 >/dev/null 2>&1 & local server=$!
  sleep 0.4
  ip netns exec $c iperf3 -c $outer.2 -p 5300 -t "$seconds" -J "$@" | python3 -c 'import json,sys; print("%.3f" % (json.load(sys.stdin)["end"]["sum_received"]["bits_per_second"]/1e9))'
  wait $server || true
}

median() { tr ' ' '\n' <<<"$1" | grep . | sort -n | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
