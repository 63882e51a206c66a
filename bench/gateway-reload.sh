#!/usr/bin/env bash
# Reload with many flows alive: none may be lost, and a probe that sends every millisecond tells the longest pause.
#   bench/gateway-reload.sh            FLOWS=100000 RELOADS=5
# A flow is lost when its answer does not come from, or does not reach, the same outside port as before. Goals: 0 lost, ≤ 5 ms pause.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/gateway-lib.sh"
need ip python3 ping
build
flows=${FLOWS:-100000} reloads=${RELOADS:-5}
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): FLOWS=$flows RELOADS=$reloads bench/gateway-reload.sh"
GATEWAY_EXTRA='core-rebalance = false'
NAT_EXTRA='flows-per-client-max = 1000000'
gateway_scene
for last in $(seq 3 41); do ip -n $s addr add "10.1.2.$last/24" dev eth0; done
forward_with anabranch
# The server answers each datagram with the source that it sees.
cat >"$work/server.py" <<'P'
import socket, select
socks = []
for last in range(2, 42):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, 33, 32 << 20); s.bind((f"10.1.2.{last}", 7)); socks.append(s)
while True:
    for s in select.select(socks, [], [])[0]:
        for _ in range(64):
            try: data, source = s.recvfrom(2048, socket.MSG_DONTWAIT)
            except BlockingIOError: break
            s.sendto(data + b" %d" % source[1], source)
P
ip netns exec $s python3 "$work/server.py" & sleep 0.5
# The client: FLOWS flows (source port, server), opened once and asked again after each reload; beside it a probe of 1 ms.
cat >"$work/client.py" <<'P'
import json, os, socket, subprocess, sys, threading, time
flows, reloads, anabranch, gw, config = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
SERVERS = range(2, 42)
per = (flows + 39) // 40
socks = []
for port in range(1100, 1100 + per):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try: s.bind(("10.1.1.2", port))
    except OSError: continue
    s.setblocking(False); socks.append(s)
def sweep():
    seen = {}
    for attempt in range(20):
        missing = [(i, last) for i in range(len(socks)) for last in SERVERS if (i, last) not in seen]
        if not missing: break
        for start in range(0, len(missing), 256):
            part = missing[start:start + 256]
            for i, last in part:
                try: socks[i].sendto(b"%d" % i, (f"10.1.2.{last}", 7))
                except BlockingIOError: pass
            time.sleep(0.004)
            for i in {i for i, _ in part}:
                while True:
                    try: data, (ip, _) = socks[i].recvfrom(2048)
                    except BlockingIOError: break
                    seen[(i, int(ip.rsplit(".", 1)[1]))] = int(data.split()[1])
    return seen
begin = time.monotonic(); first = sweep(); opened = time.monotonic() - begin
stop, gaps, lock = threading.Event(), [0.0], threading.Lock()
pid = os.fork()
if pid == 0:  # the probe, a process of its own so that the sweeps do not slow it down
    p = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); p.connect(("10.1.2.2", 7)); p.setblocking(False)
    last, worst, idle_worst, next_send, number = None, 0.0, 0.0, time.monotonic(), 0
    import signal; windows = []
    def ends(*_): raise SystemExit
    signal.signal(signal.SIGTERM, ends)
    out = open(os.environ["PROBE"], "w")
    try:
        while True:
            now = time.monotonic()
            if now >= next_send: next_send = max(next_send + 0.001, now); p.send(b"%d" % number); number += 1
            try:
                while True:
                    p.recv(2048); t = time.monotonic()
                    if last is not None and t - last > 0.002: out.write(f"{last} {t}\n"); out.flush()
                    last = t
            except BlockingIOError: pass
            time.sleep(0.0001)
    finally: os._exit(0)
def reload():
    begin = time.monotonic(); r = subprocess.run([anabranch, "reload", "--socket", gw], capture_output=True, text=True); end = time.monotonic()
    assert r.returncode == 0, r.stderr
    return begin, end
text = open(config).read()
time.sleep(2)
def pauses(a, b):
    rows = [tuple(map(float, line.split())) for line in open(os.environ["PROBE"])]
    return max([(t - l) * 1e3 for l, t in rows if t > a and l < b] or [0.0])
for n in range(reloads):
    quiet = time.monotonic(); time.sleep(1.0); before = pauses(quiet, time.monotonic())
    rule = "" if n % 2 else '[[rule]]\nname = "more"\naction = "drop"\nprotocol = "tcp"\nport = 23\n'
    open(config, "w").write(text + rule)
    begin, end = reload(); time.sleep(0.5)
    worst = pauses(begin, end + 0.3)
    again = sweep()
    lost = sum(1 for key, port in first.items() if again.get(key) != port)
    print(json.dumps({"reload": n + 1, "flows": len(first), "lost_flows": lost, "longest_pause_ms": round(worst, 2), "longest_pause_quiet_ms": round(before, 2), "reload_command_ms": round((end - begin) * 1e3, 1), "opened_in_s": round(opened, 1)}), flush=True)
os.kill(pid, 15)
P
ulimit -n "$(ulimit -H -n)"
PROBE="$work/probe" ip netns exec $c python3 "$work/client.py" "$flows" "$reloads" "$anabranch" "$work/gw.sock" "$work/gateway.toml"
"$anabranch" status --socket "$work/gw.sock" | grep -A3 'gateway core\|^NAT\|dropped' || true
