#!/usr/bin/env bash
# Two builds of the program under one bench script, in turns, so that what the machine does meanwhile hits both alike. Prints the
# median of each figure for both and their ratio; what other programs do is left out.
#   bench/compare.sh BENCH ANA_OLD ANA_NEW            ROUNDS=5, and what the script itself takes (SECONDS_PER_RUN, FLOWS …)
#   bench/compare.sh single-path ~/old/anabranch target/release/anabranch
# BENCH: single-path, gateway-veth, gateway-memory, bond or hub.
set -euo pipefail
[ $# = 3 ] || { sed -n '2,6s/^# *//p' "$0" >&2; exit 2; }
script=$(dirname "$0")/$1.sh
[ -x "$script" ] || { echo "compare: no script $script" >&2; exit 2; }
for binary in "$2" "$3"; do [ -x "$binary" ] || { echo "compare: $binary is not a program" >&2; exit 2; }; done
old=$(realpath "$2") new=$(realpath "$3")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in $(seq "${ROUNDS:-5}"); do
  # Who begins changes, so that neither always runs on the warmer machine.
  if [ $((round % 2)) = 1 ]; then order="old new"; else order="new old"; fi
  for which in $order; do
    echo "# round $round: $which" >&2
    # hub.sh says by its exit code that a goal was missed; the figures count here.
    ANA=${!which} RUNS=1 ONLY=anabranch "$script" >"$out/$which.$round" || [ "$1" = hub ] || { cat "$out/$which.$round" >&2; exit 1; }
  done
done
python3 - "$out" "$1" <<'P'
import json, pathlib, re, statistics, sys
figures = {"old": {}, "new": {}}
number = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])")
def flatten(value, name):
    if isinstance(value, dict):
        label = [str(v) for v in value.values() if isinstance(v, str)]
        for key, inner in value.items():
            if key != "run" and not isinstance(inner, str): yield from flatten(inner, name + label + [key])
    elif isinstance(value, list):
        for inner in value: yield from flatten(inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield " ".join(name), float(value)
def parse(line):
    if line.startswith("{"): return flatten(json.loads(line), [])
    template = number.sub("N", line)
    words = lambda start: " ".join(re.findall(r"[A-Za-z]\w*", line[:start])[-4:])
    return [(f"{words(m.start())} ({template.split()[0]}, {place})", float(m[0])) for place, m in enumerate(number.finditer(line), 1)]
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    which = path.name.split(".")[0]
    for line in path.read_text().splitlines():
        if line.startswith(("#", "run ")) or "median" in line[:12] and line.startswith("{"): continue
        for key, value in parse(line): figures[which].setdefault(key, []).append(value)
if not figures["old"]: sys.exit("compare: the script printed no figure")
print(f"# {sys.argv[2]}: medians")
print(f"{'figure':<76} {'old':>14} {'new':>14} {'new/old':>8}")
for key, old in figures["old"].items():
    if key not in figures["new"]: continue
    o, n = statistics.median(old), statistics.median(figures["new"][key])
    print(f"{key[-76:]:<76} {o:>14.3f} {n:>14.3f} " + (f"{n / o:>8.3f}" if o else f"{'–':>8}"))
P
