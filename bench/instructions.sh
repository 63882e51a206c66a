#!/usr/bin/env bash
# Instructions a packet, counted by callgrind: known flows of the five kinds of `anabranch bench gateway`, and sealing and opening
# a datagram of the tunnel. Two runs of different length are subtracted, so that the start does not count; seeds are fixed, and
# there is one thread, so that the figures repeat. They name the compiler, since another one makes other instructions.
#   bench/instructions.sh             counts and prints
#   bench/instructions.sh --write     and keeps them in bench/instructions.txt
#   bench/instructions.sh --check     compares with bench/instructions.txt, ± 2 %; with another rustc than it names, with a build
#                                     of the parent commit instead. Exits 1 when a figure has changed; commit the new ones then.
. "$(dirname "$0")/lib.sh"
need valgrind python3
build
list=$here/bench/instructions.txt

# ir PROGRAM ARGS… → instructions executed
ir() {
  local out; out=$(mktemp -p "$work")
  valgrind --tool=callgrind --callgrind-out-file=/dev/null "$@" >/dev/null 2>"$out" || { cat "$out" >&2; return 1; }
  sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$out"
}

# per_packet PROGRAM NAME ARGS… → "NAME instructions" in a file of its own: several run at once, and a line of one pipe may come in
# two writes.
per_packet() {
  local program=$1 name=$2 short long; shift 2
  short=$(ir "$program" bench "$@" --packets 16384) && long=$(ir "$program" bench "$@" --packets 65536) || exit 1
  python3 -c "print('%-28s %8.1f' % ('$name', ($long - $short) / (65536 - 16384)))" >"$counts/$name"
}
export -f ir per_packet
counts=$work/counts
export work counts

# count PROGRAM → all figures, in this order
count() {
  rm -rf "$counts"; mkdir "$counts"
  {
    for kind in nat port-only server plain nat-v6; do echo "gateway-$kind gateway --only $kind --flows 4096 --without-limit"; done
    for bytes in 64 1400; do
      echo "seal-$bytes seal --bytes $bytes"
      echo "open-$bytes seal --open --bytes $bytes"
    done
  } | xargs -P "$(nproc)" -I{} bash -euo pipefail -c "per_packet '$1' {}" || exit 1
  sort "$counts"/*
}

rustc=$(rustc --version)
count "$anabranch" >"$work/now"
case ${1:-} in
  --write) { echo "# Instructions a packet, by bench/instructions.sh with $rustc"; cat "$work/now"; } | tee "$list"; exit ;;
  --check) ;;
  *) cat "$work/now"; exit ;;
esac
if grep -qF "$rustc" "$list"; then
  grep -v '^#' "$list" >"$work/before"; with="bench/instructions.txt"
else
  with="the parent commit"
  git -C "$here" worktree add --quiet --detach "$work/parent" HEAD^
  trap 'git -C "$here" worktree remove --force "$work/parent"; rm -rf "$work"' EXIT
  if [ -f "$work/parent/bench/instructions.sh" ]; then
    (cd "$work/parent" && CARGO_TARGET_DIR=$target/parent cargo build --release --quiet --package anabranch)
    count "$target/parent/release/anabranch" >"$work/before"
  else
    echo "instructions: the parent commit has nothing to count"; exit
  fi
fi
python3 - "$work/before" "$work/now" "$with" <<'P'
import sys
read = lambda path: {name: float(value) for name, value in map(str.split, open(path))}
before, now = read(sys.argv[1]), read(sys.argv[2])
changed = sorted(before.keys() ^ now.keys())
for name in sorted(before.keys() & now.keys()):
    ratio = now[name] / before[name]
    bad = abs(ratio - 1) > 0.02
    print("%-28s %8.1f %8.1f  %+5.1f %%%s" % (name, before[name], now[name], 100 * (ratio - 1), "  changed" if bad else ""))
    if bad: changed.append(name)
if changed:
    print("instructions: other than in %s by more than 2 %%: %s" % (sys.argv[3], ", ".join(changed)))
    print("instructions: if that is wanted: bench/instructions.sh --write, and say why in the commit")
sys.exit(1 if changed else 0)
P
