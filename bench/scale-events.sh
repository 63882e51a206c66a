#!/usr/bin/env bash
# Real TCP connections and UDP associations through a cluster's address translation, firewall and virtual servers while units come, drain, go
# and change their share, several at once now and then; every byte compared at both ends. Then the same churn over what others do: chains of
# one, chains that a clock ends, no chains (nothing is punted), consistent hashing, nftables' hash load balancing.
# A connection is broken by a reset, a time-out, a wrong byte or a stall of more than 3 s, seen by its client or its server.
# Goals: 0 broken of 100,000 connections, 0 lost associations over 200 events; 1,000 open at every event, 20 % of all live through five events
# or more, flows in chains of three; with nothing punted the same script finds broken ones. Exits 1 when a goal is missed.
#   bench/scale-events.sh        ten minutes. SEED=1 RUNS=4 EVENTS=55 COMPARE_EVENTS=12 DATA_PLANES=6 ARGS="--pause-ms 1200 …" OUT=scale.json ANA=path
#   bench/scale-events.sh ci     90 seconds: one run, and one with nothing punted; only breaks count
# Runs one after another, with the seeds SEED, SEED + 1 …; the machine should have nothing else to do.
. "$(dirname "$0")/lib.sh"
need ip nft python3
build
seed=${SEED:-1} runs=${RUNS:-4} events=${EVENTS:-55} compare=${COMPARE_EVENTS:-12} planes=${DATA_PLANES:-6}
# 330 connections a second: 100,000 of them in four runs, a quarter of which live through five events and more.
[ "${1:-}" = ci ] || ARGS=${ARGS:---pause-ms 1200 --short-rate 210 --long 1700 --long-life 14}
read -ra more <<<"${ARGS:-}"
ways=(newest:1 clock:6000 newest:0 rendezvous nftables)
if [ "${1:-}" = ci ]; then runs=1 events=25 compare=8 planes=4 ways=(newest:0); fi
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): SEED=$seed RUNS=$runs EVENTS=$events COMPARE_EVENTS=$compare DATA_PLANES=$planes ARGS=${ARGS:-} bench/scale-events.sh ${1:-}"
# Where others work besides, connections stall because nobody gets CPU: the load before says whether the figures mean anything.
echo "# load before: $(cut -d' ' -f1-3 /proc/loadavg)"
for run in $(seq 0 $((runs - 1))); do
  "$anabranch" bench scale --seed $((seed + run)) --events "$events" --data-planes "$planes" "${more[@]}" --json >"$work/own-$run.json" 2>>"$work/log" || true
done
for way in "${ways[@]}"; do
  "$anabranch" bench scale --seed "$seed" --events "$compare" --data-planes "$planes" "${more[@]}" --only-compare --compare "$way" --json >"$work/compare-$way.json" 2>>"$work/log" || true
done
python3 - "$work" "${1:-}" "${OUT:-}" "${ways[@]}" <<'P' || { tail -n 40 "$work/log" >&2; exit 1; }
import glob, json, sys
work, short, out, ways = sys.argv[1], sys.argv[2] == "ci", sys.argv[3], sys.argv[4:]
def read(name):
    text = open(name).read()
    if not text: sys.exit(f"# {name} is empty: the run failed")
    return json.loads(text)["variants"][0]
own = [read(name) for name in sorted(glob.glob(f"{work}/own-*.json"))]
others = [read(f"{work}/compare-{way}.json") for way in ways]
def table(name, runs):
    add = lambda key: sum(run[key] for run in runs)
    return {"way": name, "events": add("events"), "connections": add("connections"), "broken": add("broken"),
        "broken_percent": round(100 * add("broken") / max(1, add("connections")), 3),
        "udp_associations": add("udp_associations"), "udp_lost": add("udp_lost"), "undecided": add("undecided"),
        "open_least": min(run["open_least"] for run in runs),
        "lived_5_events_percent": round(sum(run["lived_5_events_percent"] * run["connections"] for run in runs) / max(1, add("connections")), 1),
        "events_with_chains_of_3": add("events_with_chains_of_3"),
        "flows_in_chains_of_3_most": max(run["flows_in_chains_of_3_most"] for run in runs),
        "second_hops_percent": round(sum(run["units"]["second_hops_percent"] * run["units"]["packets"] for run in runs) / max(1, sum(run["units"]["packets"] for run in runs)), 2),
        "longest_gap_ms": max(run["longest_gap_ms"] for run in runs), "longest_change_ms": round(max(run["longest_change_ms"] for run in runs)),
        "removed": sum(run["units"]["removed"] for run in runs),
        "services": {service["name"]: [sum(s[key] for run in runs for s in run["services"] if s["name"] == service["name"]) for key in ("connections", "broken", "udp_associations", "udp_lost")] for service in runs[0]["services"]}}
rows = [table("anabranch", own)] + [table(run["name"], [run]) for run in others]
print(f"{'way':<12}{'events':>7}{'connections':>12}{'broken':>8}{'%':>8}{'UDP':>7}{'lost':>6}{'open ≥':>8}{'≥5 ev.':>8}{'chain ≥3':>9}{'2nd hops':>9}{'gap ms':>8}{'change ms':>10}")
for row in rows:
    print(f"{row['way']:<12}{row['events']:>7}{row['connections']:>12}{row['broken']:>8}{row['broken_percent']:>8.2f}{row['udp_associations']:>7}{row['udp_lost']:>6}{row['open_least']:>8}{row['lived_5_events_percent']:>7.0f}%{row['flows_in_chains_of_3_most']:>9}{row['second_hops_percent']:>8.2f}%{row['longest_gap_ms']:>8.0f}{row['longest_change_ms']:>10}")
    for name, (connections, broken, udp, lost) in row["services"].items():
        print(f"  {name:<17}{connections:>12}{broken:>8}{100 * broken / max(1, connections):>8.2f}{udp:>7}{lost:>6}")
ours, unpunted = rows[0], next(row for row in rows if row["way"] == "newest:0")
goals = {"nothing broke": ours["broken"] == 0 and ours["udp_lost"] == 0 and ours["undecided"] == 0 and ours["connections"] > 0,
    "with nothing punted connections break": unpunted["broken"] > 0}
if not short:
    goals |= {"100,000 connections": ours["connections"] >= 100_000, "200 events": ours["events"] >= 200, "1,000 open at every event": ours["open_least"] >= 1_000,
        "20 % live through five events": ours["lived_5_events_percent"] >= 20, "flows in chains of three": ours["events_with_chains_of_3"] > 0}
for goal, met in goals.items(): print(f"# {'met' if met else 'NOT met'}: {goal}")
if out: json.dump({"rows": rows, "goals": goals, "runs": own + others}, open(out, "w"), indent=1)
for run in own:
    for service in run["services"]:
        for fault in service["faults"][:10]: print(f"# {service['name']}: {fault}")
sys.exit(0 if all(goals.values()) else 1)
P
