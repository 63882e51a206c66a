#!/usr/bin/env bash
# Reload with many flows alive, all of which send and are answered: none may be lost, and no packet may wait.
#   bench/gateway-reload.sh            FLOWS=100000 RELOADS=20 RATE=25000 RULES=0 GROUP=0 REALTIME=0
# The flows take turns. Each datagram carries its time of sending and is stamped by the kernel as it arrives at the server's
# interface: the receiver's wait for a CPU does not count, so it gives way to the workers, and the sender has real-time priority.
# In turns: a second after a reload, and a second of the same run without one. Beside it what each worker says of itself:
# how long the reload held up its round. A flow is lost when its datagrams change their outside port or its answers stop.
# RULES, GROUP: more rules and prefixes that are there before and after. REALTIME=1: the gateway has real-time priority too.
# Goals: 0 lost, no pause above 5 ms. Exits 1 when a flow is lost or a reload holds up a round for longer.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/gateway-lib.sh"
need ip python3 ping cc chrt
build
flows=${FLOWS:-100000} reloads=${RELOADS:-20} rate=${RATE:-25000} rules=${RULES:-0} group=${GROUP:-0}
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): FLOWS=$flows RELOADS=$reloads RATE=$rate RULES=$rules GROUP=$group REALTIME=${REALTIME:-0} bench/gateway-reload.sh"
GATEWAY_EXTRA='core-rebalance = false'
NAT_EXTRA='flows-per-client-max = 1000000'
cat >"$work/pulse.c" <<'C'
// pulse send FLOWS RATE SECONDS | pulse receive FLOWS SECONDS FILE
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#define SERVERS 40
#define BATCH 64
struct pulse { uint32_t flow, turn; uint64_t sent_ns; };
static uint64_t clock_ns(int id) { struct timespec t; clock_gettime(id, &t); return t.tv_sec * 1000000000ull + t.tv_nsec; }
static int send_all(int flows, int rate, double seconds) {
  int sockets = (flows + SERVERS - 1) / SERVERS, *fd = calloc(sockets, sizeof *fd), one = 1 << 20;
  uint32_t *answered = calloc(flows, sizeof *answered); struct sockaddr_in to[SERVERS];
  for (int i = 0; i < SERVERS; i++) { char text[32]; snprintf(text, sizeof text, "10.1.2.%d", 2 + i); to[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(7)}; inet_pton(AF_INET, text, &to[i].sin_addr); }
  for (int i = 0; i < sockets; i++) {
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(2000 + i)}; inet_pton(AF_INET, "10.1.1.2", &own.sin_addr);
    fd[i] = socket(AF_INET, SOCK_DGRAM, 0); setsockopt(fd[i], SOL_SOCKET, SO_RCVBUFFORCE, &one, sizeof one);
    if (fd[i] < 0 || bind(fd[i], (void *)&own, sizeof own)) return perror("socket"), 1;
  }
  uint64_t sent = 0, answers = 0, strange = 0, tick = clock_ns(CLOCK_MONOTONIC), end = tick + (uint64_t)(seconds * 1e9); int next = 0; uint32_t turn = 1;
  struct pulse p;
  for (; tick < end; tick += 1000000) {
    struct timespec until = {tick / 1000000000, tick % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0);
    for (int i = 0; i < rate / 1000; i++) {
      int s = next / SERVERS;
      for (int k = 0; k < 2 && recv(fd[s], &p, sizeof p, MSG_DONTWAIT) == sizeof p; k++) { answers++; if (p.flow / SERVERS != (uint32_t)s) strange++; else if (p.turn > answered[p.flow]) answered[p.flow] = p.turn; }
      p = (struct pulse){next, turn, clock_ns(CLOCK_REALTIME)};
      if (sendto(fd[s], &p, sizeof p, 0, (void *)&to[next % SERVERS], sizeof *to) == sizeof p) sent++;
      if (++next == flows) { next = 0; turn++; }
    }
  }
  usleep(300000);
  for (int s = 0; s < sockets; s++) while (recv(fd[s], &p, sizeof p, MSG_DONTWAIT) == sizeof p) { answers++; if (p.flow / SERVERS != (uint32_t)s) strange++; else if (p.turn > answered[p.flow]) answered[p.flow] = p.turn; }
  int lost = 0;
  for (int f = 0; f < flows; f++) if (answered[f] + 2 < turn) lost++;
  printf("{\"sent\": %lu, \"answers\": %lu, \"answers_astray\": %lu, \"flows_without_answer\": %d, \"turns\": %u}\n", sent, answers, strange, lost, turn);
  return 0;
}
static int receive_all(int flows, double seconds, const char *file) {
  static char data[BATCH][64], control[BATCH][256]; static struct mmsghdr m[BATCH]; static struct iovec v[BATCH]; static struct sockaddr_in from[BATCH];
  int fd = socket(AF_INET, SOCK_DGRAM, 0), one = 1, room = 64 << 20; struct timeval patience = {0, 200000}; struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(7)};
  setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room); setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one); setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &one, sizeof one);
  if (bind(fd, (void *)&own, sizeof own)) return perror("bind"), 1;
  uint64_t *seen = calloc(flows, sizeof *seen), count = 0, changed = 0, most = 0, end = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(seconds * 1e9); FILE *out = fopen(file, "wb"); uint32_t known = 0;
  setvbuf(out, malloc(64 << 20), _IOFBF, 64 << 20);
  while (clock_ns(CLOCK_MONOTONIC) < end) {
    for (int i = 0; i < BATCH; i++) { v[i] = (struct iovec){data[i], 64}; m[i].msg_hdr = (struct msghdr){.msg_name = &from[i], .msg_namelen = sizeof *from, .msg_iov = &v[i], .msg_iovlen = 1, .msg_control = control[i], .msg_controllen = 256}; }
    int n = recvmmsg(fd, m, BATCH, MSG_WAITFORONE, 0), answers = 0;
    for (int i = 0; i < n; i++) {
      struct pulse p; uint64_t stamp = 0; struct in_addr local = {0};
      if (m[i].msg_len != sizeof p) continue;
      memcpy(&p, data[i], sizeof p);
      for (struct cmsghdr *c = CMSG_FIRSTHDR(&m[i].msg_hdr); c; c = CMSG_NXTHDR(&m[i].msg_hdr, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_TIMESTAMPNS) { struct timespec t; memcpy(&t, CMSG_DATA(c), sizeof t); stamp = t.tv_sec * 1000000000ull + t.tv_nsec; }
        if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) { struct in_pktinfo info; memcpy(&info, CMSG_DATA(c), sizeof info); local = info.ipi_spec_dst; }
      }
      uint64_t source = (uint64_t)from[i].sin_addr.s_addr << 16 | from[i].sin_port;
      if (p.flow < (uint32_t)flows) { if (!seen[p.flow]) seen[p.flow] = source, known++; else if (seen[p.flow] != source) changed++; }
      uint64_t sample[2] = {p.sent_ns, stamp - p.sent_ns}; fwrite(sample, sizeof sample, 1, out); count++; if (sample[1] > most) most = sample[1];
      struct in_pktinfo info = {.ipi_spec_dst = local}; struct msghdr *h = &m[i].msg_hdr; struct cmsghdr *c = (void *)control[i];
      *c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof info), .cmsg_level = IPPROTO_IP, .cmsg_type = IP_PKTINFO}; memcpy(CMSG_DATA(c), &info, sizeof info);
      h->msg_controllen = CMSG_SPACE(sizeof info); v[i].iov_len = sizeof p; h->msg_flags = 0; answers++;
    }
    for (int done = 0; answers == n && done < n;) { int sent = sendmmsg(fd, m + done, n - done, 0); if (sent <= 0) break; done += sent; }
  }
  fclose(out);
  printf("{\"received\": %lu, \"flows\": %u, \"outside_ports_changed\": %lu, \"longest_delay_ms\": %.3f}\n", count, known, changed, most / 1e6);
  return 0;
}
int main(int argc, char **argv) {
  if (argc == 5 && !strcmp(argv[1], "send")) return send_all(atoi(argv[2]), atoi(argv[3]), atof(argv[4]));
  if (argc == 5) return receive_all(atoi(argv[2]), atof(argv[3]), argv[4]);
  return 2;
}
C
cc -O2 -o "$work/pulse" "$work/pulse.c"
# Rules and prefixes that no packet here has anything to do with, as a big configuration has them.
python3 - "$rules" "$group" "$work/more.toml" <<'P'
import sys
rules, group, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with open(file, "w") as out:
    if group: out.write('[[group]]\nname = "many"\nmembers = [%s]\n' % ", ".join(f'"172.{16 + (i >> 16)}.{i >> 8 & 255}.{i & 255}"' for i in range(group)))
    for i in range(rules): out.write(f'[[rule]]\naction = "drop"\nfrom = "{"many" if group and i % 2 else f"192.0.{2 + i // 256 % 200}.{i % 256}"}"\nprotocol = "tcp"\nport = {1 + i % 60000}\n')
P
gateway_scene
for last in $(seq 3 41); do ip -n $s addr add "10.1.2.$last/24" dev eth0; done
forward_with anabranch
cat "$work/more.toml" >>"$work/gateway.toml"; "$anabranch" reload --socket "$work/gw.sock" >/dev/null
if [ "${REALTIME:-0}" = 1 ]; then
  for pid in $(ip netns pids $g); do for task in /proc/$pid/task/*; do case $(cat "$task/comm") in worker-*) chrt -f -p 40 "${task##*/}" >/dev/null ;; esac; done; done
fi
ulimit -n "$(ulimit -H -n)"
turn=$(python3 -c "print($flows/$rate)") # seconds in which every flow has sent once
total=$(python3 -c "print(2*$turn + 2 + $reloads*($turn+2))")
ip netns exec $s nice -n 10 "$work/pulse" receive "$flows" "$(python3 -c "print($total+2)")" "$work/samples" >"$work/received" & receiver=$!
sleep 0.3
ip netns exec $c chrt -f 50 "$work/pulse" send "$flows" "$rate" "$total" >"$work/sent" & sender=$!
cat >"$work/reloads.py" <<'P'
import json, subprocess, sys, time
reloads, anabranch, socket, config, turn, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]), sys.argv[6]
def status(): return json.loads(subprocess.run([anabranch, "status", "--json", "--socket", socket], capture_output=True, text=True, check=True).stdout)["gateway"]
def cores(): return [{k: c.get(k) for k in ("round_us_max", "rounds_over_1ms", "rounds_over_5ms", "reload_us_last", "reload_us_max", "reload_cpu_us_max", "live_flows")} for c in status()["cores"]]
text, windows, last = open(config).read(), [], []
time.sleep(2 * turn + 0.5)
first = cores()
for n in range(reloads):
    # A quiet second; every flow has been decided under the policy in force by now.
    quiet = time.time_ns(); time.sleep(1.0); quiet_end = time.time_ns()
    open(config, "w").write(text + ("" if n % 2 else '[[rule]]\nname = "more"\naction = "drop"\nprotocol = "tcp"\nport = 23\n'))
    begin = time.time_ns(); r = subprocess.run([anabranch, "reload", "--socket", socket], capture_output=True, text=True); end = time.time_ns()
    assert r.returncode == 0, r.stderr
    time.sleep(1.0)
    windows.append((quiet, quiet_end, begin, time.time_ns(), (end - begin) / 1e6))
    time.sleep(turn - 0.2); last.append([c["reload_us_last"] for c in cores()])
json.dump({"windows": windows, "reload_us": last, "first": first, "cores": cores()}, open(out, "w"))
P
python3 "$work/reloads.py" "$reloads" "$anabranch" "$work/gw.sock" "$work/gateway.toml" "$turn" "$work/result"
wait $sender $receiver
"$anabranch" status --socket "$work/gw.sock" | grep -A3 'gateway core\|dropped' || true
python3 - "$work" "$flows" <<'P'
import array, bisect, json, sys
work, flows = sys.argv[1], int(sys.argv[2])
samples = array.array("Q"); samples.frombytes(open(f"{work}/samples", "rb").read())
result, sent, received = (json.load(open(f"{work}/{name}")) for name in ("result", "sent", "received"))
pairs = sorted(zip(samples[0::2], samples[1::2])); at = [p[0] for p in pairs]
def part(windows):
    delays, worst = [], []
    for begin, end in windows:
        some = [p[1] for p in pairs[bisect.bisect(at, begin):bisect.bisect(at, end)]]
        delays += some; worst.append(max(some))
    delays.sort(); worst.sort(); us = lambda share: round(delays[min(int(len(delays) * share), len(delays) - 1)] / 1e3, 1)
    return {"datagrams": len(delays), "p50_us": us(.5), "p99_us": us(.99), "p999_us": us(.999), "longest_ms": round(delays[-1] / 1e6, 2), "longest_of_a_window_median_ms": round(worst[len(worst) // 2] / 1e6, 2), "windows_over_5ms": sum(w > 5e6 for w in worst)}
print(json.dumps({"delay": "a second without a reload", **part([w[:2] for w in result["windows"]])}))
print(json.dumps({"delay": "a second with a reload", **part([w[2:4] for w in result["windows"]])}))
took = sorted(us for each in result["reload_us"] for us in each)
print(json.dumps({"reloads": len(result["windows"]), "reload_holds_up_a_worker_us": {"p50": took[len(took) // 2], "p99": took[int(len(took) * .99)], "max": took[-1]}, "command_ms_median": sorted(w[4] for w in result["windows"])[len(result["windows"]) // 2]}))
for core, (before, after) in enumerate(zip(result["first"], result["cores"])):
    print(json.dumps({"core": core, **after, "rounds_over_1ms": after["rounds_over_1ms"] - before["rounds_over_1ms"], "rounds_over_5ms": after["rounds_over_5ms"] - before["rounds_over_5ms"]}))
print(json.dumps({**sent, **received}))
lost = sent["flows_without_answer"] + sent["answers_astray"] + received["outside_ports_changed"] + flows - received["flows"]
good = lost == 0 and took[-1] <= 5000
print(f"# lost flows {lost}, longest hold-up of a worker by a reload {took[-1] / 1e3} ms:", "every figure met" if good else "NOT met")
sys.exit(0 if good else 1)
P
