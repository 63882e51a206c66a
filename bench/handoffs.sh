#!/usr/bin/env bash
# Replies on the core of their request over ten million random flows of each NAT mode, in memory: 0 elsewhere in C2 and C3,
# in C4 and after buckets moved exactly those that the hash demands; every port that can serve a core and a destination is
# given out before the first refusal. Exits 1 when a figure is not met.
#   bench/handoffs.sh            FLOWS=10000000 CORES=4
. "$(dirname "$0")/lib.sh"
need python3
build
set -- bench handoffs --flows "${FLOWS:-10000000}" --cores "${CORES:-4}"
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): anabranch $*"
"$anabranch" "$@" --json >"$work/handoffs.json" || true
python3 - "$work/handoffs.json" <<'P'
import json, sys
report = json.load(open(sys.argv[1]))
for row in report["rows"]: print(json.dumps(row))
ports = report["ports"]
for row in ("C2", "C3"):
    for family in ("IPv4", "IPv6"):
        some = [p for p in ports if (p["row"], p["family"]) == (row, family)]
        print(json.dumps({"row": row, "family": family, "cores": len(some), "usable": sum(p["usable"] for p in some),
            "opened": sum(p["opened"] for p in some), "words_max": max(p["words_max"] for p in some),
            "checks_max": max(p["checks_max"] for p in some), "refusal_words": max(p["refusal_words"] for p in some),
            "refusal_checks": max(p["refusal_checks"] for p in some), "first_ns": max(p["first_ns"] for p in some),
            "last_ns": max(p["last_ns"] for p in some)}))
at_rest = [r for r in report["rows"] if r["row"] in ("C2", "C3") and r["buckets_moved"] == 0]
good = report["kept"] and all(r["replies_elsewhere"] + r["replies_handed_over"] + r["requests_handed_over"] == 0 for r in at_rest)
print("# every figure met" if good else "# NOT met")
sys.exit(0 if good else 1)
P
