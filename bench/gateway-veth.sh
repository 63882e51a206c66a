#!/usr/bin/env bash
# Forwarding with address translation between namespaces on this machine, in turns: anabranch, the kernel's nftables masquerade,
# plain kernel forwarding. UDP floods of 64-byte frames, one flow and 64, counted at the receiver; one iperf3 TCP stream.
# Prints each run as one JSON line and the ratios of the medians.
#   bench/gateway-veth.sh            SECONDS_PER_RUN=5 RUNS=3; ONLY=anabranch leaves the kernel out
# Goals: udp ≥ 1.5 × masquerade, tcp ≥ 0.8 × plain.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/gateway-lib.sh"
need ip nft iperf3 python3 ping cc
build; build_flooder
echo "# $(date -u +%FT%TZ) $(uname -r) $(nproc) cores, $(git -C "$here" rev-parse --short HEAD): SECONDS_PER_RUN=$seconds RUNS=${RUNS:-3} bench/gateway-veth.sh"
declare -A result
for run in $(seq "${RUNS:-3}"); do
  for way in ${ONLY:-anabranch masquerade plain}; do
    gateway_scene; forward_with $way
    one=$(flood 1); sent1=$(cat "$work/sent"); many=$(flood 64); sent64=$(cat "$work/sent"); tcp1=$(bulk); rev=$(bulk -R)
    echo "{\"run\": $run, \"way\": \"$way\", \"udp64_1flow_pps\": $one, \"sent_1flow_pps\": $sent1, \"udp64_64flows_pps\": $many, \"sent_64flows_pps\": $sent64, \"tcp_gbps\": $tcp1, \"tcp_reverse_gbps\": $rev}"
    for k in one many tcp1 rev; do result[$way.$k]="${result[$way.$k]:-} ${!k}"; done
  done
done
[ -z "${ONLY:-}" ] || exit 0
m() { median "${result[$1]}"; }
echo "{\"median_udp_1flow_vs_masquerade\": $(ratio "$(m anabranch.one)" "$(m masquerade.one)"), \"median_udp_64flows_vs_masquerade\": $(ratio "$(m anabranch.many)" "$(m masquerade.many)"), \"median_udp_1flow_vs_plain\": $(ratio "$(m anabranch.one)" "$(m plain.one)"), \"median_udp_64flows_vs_plain\": $(ratio "$(m anabranch.many)" "$(m plain.many)"), \"median_tcp_vs_plain\": $(ratio "$(m anabranch.tcp1)" "$(m plain.tcp1)"), \"median_tcp_reverse_vs_plain\": $(ratio "$(m anabranch.rev)" "$(m plain.rev)")}"
