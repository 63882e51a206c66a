-- Wireshark dissector of Anabranch's datagrams: the clear header of the tunnel (UDP port 4600) and the encapsulation between
-- the units of a cluster (UDP port 4602). Byte by byte: docs/wire.md, docs/wire-cluster.md.
--
-- Copy it to the personal Lua plugins folder (Help, About, Folders), or name it: wireshark -X lua_script:anabranch.lua
-- The ports can be changed in Edit, Preferences, Protocols.

-- The tunnel

local tunnel = Proto("anabranch", "Anabranch tunnel")
tunnel.prefs.port = Pref.uint("UDP port", 4600, "UDP port of the listening side")

local KINDS = {
    [1] = "Initiation", [2] = "Response", [3] = "Cookie reply", [4] = "Data", [5] = "Clear", [6] = "Partial", [7] = "Sealed header",
}
local NOT_TOLD = 255
local HEADER_BYTES = 16

local t = {
    version = ProtoField.uint8("anabranch.version", "Version", base.DEC, nil, 0xf0),
    kind = ProtoField.uint8("anabranch.kind", "Kind", base.DEC, KINDS, 0x0f),
    receiving_core = ProtoField.uint8("anabranch.receiving_core", "Receiving core", base.DEC, { [NOT_TOLD] = "not told" }),
    sealed_core = ProtoField.uint8("anabranch.sealed_core", "Receiving core, sealed", base.HEX),
    sending_core = ProtoField.uint8("anabranch.sending_core", "Sending core", base.DEC),
    path = ProtoField.uint8("anabranch.path", "Path", base.DEC),
    index = ProtoField.uint32("anabranch.index", "Receiver index", base.HEX),
    counter = ProtoField.uint64("anabranch.counter", "Counter", base.DEC),
    sealed_counter = ProtoField.uint64("anabranch.sealed_counter", "Counter, low half sealed", base.HEX),
    part = ProtoField.uint8("anabranch.part", "Part", base.DEC),
    last_part = ProtoField.uint8("anabranch.last_part", "Last part", base.DEC),
    listener_index = ProtoField.uint32("anabranch.listener_index", "Listener's index", base.HEX),
    is_challenge = ProtoField.bool("anabranch.challenge", "Freshness challenge"),
    is_gone = ProtoField.bool("anabranch.no_session", "No session"),
    clear_bytes = ProtoField.uint16("anabranch.clear_bytes", "Length of the clear part", base.DEC),
    frames = ProtoField.bytes("anabranch.frames", "Frames"),
    sealed = ProtoField.bytes("anabranch.sealed", "Sealed"),
    tag = ProtoField.bytes("anabranch.tag", "Tag"),
    handshake = ProtoField.bytes("anabranch.handshake", "Handshake message"),
}
tunnel.fields = t

local tunnel_bad = ProtoExpert.new("anabranch.bad", "Not a datagram of this version", expert.group.MALFORMED, expert.severity.ERROR)
tunnel.experts = { tunnel_bad }

local TAG_BYTES = 16

local function tunnel_counter(tvb, tree, kind)
    if kind == 1 or kind == 2 then
        tree:add(t.part, tvb(8, 1))
        tree:add(t.last_part, tvb(9, 1))
        if kind == 2 then tree:add(t.listener_index, tvb(12, 4)) end
    elseif kind == 3 then
        tree:add(t.is_challenge, tvb(8, 8), tvb(12, 4):uint() == 1)
        tree:add(t.is_gone, tvb(8, 8), tvb(12, 4):uint() == 2)
    elseif kind == 7 then
        tree:add(t.sealed_counter, tvb(8, 8))
    else
        tree:add(t.counter, tvb(8, 8))
    end
end

local function tunnel_body(tvb, tree, kind)
    local from, to = HEADER_BYTES, tvb:len() - TAG_BYTES
    if kind <= 3 then
        if tvb:len() > from then tree:add(t.handshake, tvb(from)) end
        return
    end
    if to < from then return tree:add_proto_expert_info(tunnel_bad, "No room for the tag") end
    if kind == 6 then
        if to < from + 2 then return tree:add_proto_expert_info(tunnel_bad, "No length of the clear part") end
        tree:add(t.clear_bytes, tvb(from, 2))
        local clear = tvb(from, 2):uint()
        from = from + 2
        if from + clear > to then return tree:add_proto_expert_info(tunnel_bad, "Clear part beyond the tag") end
        if clear > 0 then tree:add(t.frames, tvb(from, clear)) end
        from = from + clear
    end
    if to > from then tree:add(kind == 5 and t.frames or t.sealed, tvb(from, to - from)) end
    tree:add(t.tag, tvb(to))
end

function tunnel.dissector(tvb, pinfo, root)
    if tvb:len() < HEADER_BYTES then return 0 end
    local version, kind = tvb(0, 1):bitfield(0, 4), tvb(0, 1):bitfield(4, 4)
    if version ~= 1 or not KINDS[kind] then return 0 end
    pinfo.cols.protocol = "Anabranch"
    local tree = root:add(tunnel, tvb(), "Anabranch tunnel, " .. KINDS[kind])
    tree:add(t.version, tvb(0, 1))
    tree:add(t.kind, tvb(0, 1))
    tree:add(kind == 7 and t.sealed_core or t.receiving_core, tvb(1, 1))
    tree:add(t.sending_core, tvb(2, 1))
    tree:add(t.path, tvb(3, 1))
    tree:add(t.index, tvb(4, 4))
    tunnel_counter(tvb, tree, kind)
    tunnel_body(tvb, tree, kind)
    local core = kind == 7 and "a sealed one" or tvb(1, 1):uint()
    pinfo.cols.info = string.format("%s, path %d, core %d to %s", KINDS[kind], tvb(3, 1):uint(), tvb(2, 1):uint(), core)
    return tvb:len()
end

-- Between the units of a cluster

local bus = Proto("anabranch_bus", "Anabranch between units")
bus.prefs.port = Pref.uint("UDP port", 4602, "UDP port on which units listen for each other")

local TYPES = { [0] = "dispatched", [1] = "handed on" }
local HANDOFFS = {
    [0] = "dispatch", [1] = "punt", [2] = "unclaimed", [3] = "broadcast", [4] = "reply", [5] = "resolve", [6] = "trace",
}
local HOOKS = { [0] = "before services", [1] = "after fragment rendezvous", [2] = "own sockets", [3] = "bond" }
local L1_BYTES, FIXED_BYTES, FRAGMENT_HEAD_BYTES, ETHERNET_BYTES = 6, 14, 8, 14
local OPTION_WORDS_MAX, ROUTE_WORDS_MAX = 5, 4

local b = {
    version = ProtoField.uint16("anabranch_bus.version", "Version", base.DEC, nil, 0xc000),
    is_fragment = ProtoField.bool("anabranch_bus.fragment", "Fragment", 16, nil, 0x2000),
    is_tagged = ProtoField.bool("anabranch_bus.tagged", "VLAN tag", 16, nil, 0x1000),
    dispatcher = ProtoField.uint16("anabranch_bus.dispatcher", "Dispatcher", base.DEC, nil, 0x0fff),
    target = ProtoField.uint16("anabranch_bus.target", "Target", base.DEC),
    priority = ProtoField.uint16("anabranch_bus.vlan.priority", "VLAN priority", base.DEC, nil, 0xe000),
    is_eligible = ProtoField.bool("anabranch_bus.vlan.dei", "VLAN drop eligible", 16, nil, 0x1000),
    vlan = ProtoField.uint16("anabranch_bus.vlan.id", "VLAN", base.DEC, nil, 0x0fff),
    kind = ProtoField.uint32("anabranch_bus.type", "TYPE", base.DEC, TYPES, 0xf0000000),
    size = ProtoField.uint32("anabranch_bus.hdr_size", "HDR SIZE", base.DEC, nil, 0x0fc00000),
    trr = ProtoField.bool("anabranch_bus.trr", "TRR", 32, nil, 0x00200000),
    era = ProtoField.uint32("anabranch_bus.era", "ERA", base.DEC, nil, 0x00100000),
    snode = ProtoField.uint32("anabranch_bus.snode", "SNODE", base.DEC, nil, 0x000fff00),
    ifid = ProtoField.uint32("anabranch_bus.ifid", "IFID", base.DEC, nil, 0x000000ff),
    ttl = ProtoField.uint32("anabranch_bus.ttl", "TTL", base.DEC, nil, 0xff000000),
    handoff = ProtoField.uint32("anabranch_bus.handoff", "HANDOFF TYPE", base.DEC, HANDOFFS, 0x00f00000),
    hook = ProtoField.uint32("anabranch_bus.hook", "HOOK", base.DEC, HOOKS, 0x000f0000),
    table = ProtoField.uint32("anabranch_bus.table", "TABLE", base.DEC, nil, 0x0000f000),
    recorded = ProtoField.uint32("anabranch_bus.recorded", "Recorded", base.DEC, nil, 0x00000f00),
    is_v6 = ProtoField.bool("anabranch_bus.next_hop_ipv6", "Next hop is IPv6", 32, nil, 0x00000001),
    is_offloaded = ProtoField.bool("anabranch_bus.offloaded", "Offload header", 32, nil, 0x00000002),
    offload_flags = ProtoField.uint8("anabranch_bus.offload.flags", "Offload flags", base.HEX),
    offload_type = ProtoField.uint8("anabranch_bus.offload.type", "Offload type", base.DEC),
    offload_header = ProtoField.uint16("anabranch_bus.offload.header_bytes", "Header bytes", base.DEC),
    offload_segment = ProtoField.uint16("anabranch_bus.offload.segment_bytes", "Segment bytes", base.DEC),
    offload_start = ProtoField.uint16("anabranch_bus.offload.checksum_start", "Checksum start", base.DEC),
    offload_offset = ProtoField.uint16("anabranch_bus.offload.checksum_offset", "Checksum offset", base.DEC),
    src_port = ProtoField.uint16("anabranch_bus.src_port", "Source port of the flow", base.DEC),
    dst_port = ProtoField.uint16("anabranch_bus.dst_port", "Destination port of the flow", base.DEC),
    hop_v4 = ProtoField.ipv4("anabranch_bus.next_hop", "Next hop"),
    hop_v6 = ProtoField.ipv6("anabranch_bus.next_hop6", "Next hop"),
    nid = ProtoField.uint16("anabranch_bus.nid", "Node of the route", base.DEC),
    unknown = ProtoField.bytes("anabranch_bus.unknown", "Unknown words"),
    id = ProtoField.uint32("anabranch_bus.fragment.id", "Identification", base.HEX),
    offset = ProtoField.uint16("anabranch_bus.fragment.offset", "Offset", base.DEC),
    total = ProtoField.uint16("anabranch_bus.fragment.total", "Total", base.DEC),
    data = ProtoField.bytes("anabranch_bus.fragment.data", "Bytes"),
}
bus.fields = b

local bus_bad = ProtoExpert.new("anabranch_bus.bad", "Fields that contradict each other", expert.group.MALFORMED, expert.severity.ERROR)
bus.experts = { bus_bad }

local function add_l1(tvb, tree)
    for _, field in ipairs({ b.version, b.is_fragment, b.is_tagged, b.dispatcher }) do tree:add(field, tvb(0, 2)) end
    tree:add(b.target, tvb(2, 2))
    if tvb(0, 1):bitfield(3, 1) == 1 then
        for _, field in ipairs({ b.priority, b.is_eligible, b.vlan }) do tree:add(field, tvb(4, 2)) end
    end
end

-- Option words up to `last`, as the fixed words say; returns the offset behind those that are known.
local function add_options(tvb, tree, at, last, trr, handoff, hook, flags, recorded)
    local is_v6, is_offloaded = flags % 2 == 1, flags >= 2
    local left = OPTION_WORDS_MAX
    local function fits(bytes) return at + bytes <= last end
    if hook == 1 and fits(4) then
        tree:add(b.src_port, tvb(at, 2))
        tree:add(b.dst_port, tvb(at + 2, 2))
        at, left = at + 4, left - 1
    end
    if handoff == 5 then
        local bytes = is_v6 and 16 or 4
        if fits(bytes) then tree:add(is_v6 and b.hop_v6 or b.hop_v4, tvb(at, bytes)) end
        at, left = at + bytes, left - bytes / 4
    end
    if is_offloaded then
        if fits(12) then
            tree:add(b.offload_flags, tvb(at, 1))
            tree:add(b.offload_type, tvb(at + 1, 1))
            tree:add(b.offload_header, tvb(at + 2, 2))
            tree:add(b.offload_segment, tvb(at + 4, 2))
            tree:add(b.offload_start, tvb(at + 6, 2))
            tree:add(b.offload_offset, tvb(at + 8, 2))
        end
        at = at + 12
    end
    if trr then
        local bytes = 4 * math.min(left, ROUTE_WORDS_MAX)
        for place = 0, recorded - 1 do
            if 2 * place < bytes and fits(2 * place + 2) then tree:add(b.nid, tvb(at + 2 * place, 2)) end
        end
        at = at + bytes
    end
    return at
end

-- L2 that begins at `at`; returns the offset of the inner frame and the handoff's name.
local function add_l2(tvb, tree, at, dispatcher)
    local first, second = tvb(at, 4), tvb(at + 4, 4)
    for _, field in ipairs({ b.kind, b.size, b.trr, b.era, b.snode, b.ifid }) do tree:add(field, first) end
    for _, field in ipairs({ b.ttl, b.handoff, b.hook, b.table, b.recorded, b.is_offloaded, b.is_v6 }) do tree:add(field, second) end
    local last = at + 4 + 4 * first:bitfield(4, 6)
    local handoff, hook = second:bitfield(8, 4), second:bitfield(12, 4)
    local name = HANDOFFS[handoff] or "unknown handoff"
    local known = add_options(tvb, tree, at + 8, math.min(last, tvb:len()), first:bitfield(10, 1) == 1, handoff, hook,
        second:bitfield(30, 2), second:bitfield(20, 4))
    if known > last then tree:add_proto_expert_info(bus_bad, "HDR SIZE is before the end of the options") end
    if last > known and last <= tvb:len() then tree:add(b.unknown, tvb(known, last - known)) end
    if first:bitfield(12, 12) ~= dispatcher then tree:add_proto_expert_info(bus_bad, "SNODE is not the dispatcher") end
    if (first:bitfield(0, 4) == 0) ~= (handoff == 0) then tree:add_proto_expert_info(bus_bad, "TYPE is not HANDOFF TYPE's") end
    if second:bitfield(0, 8) == 0 then tree:add_proto_expert_info(bus_bad, "TTL is 0") end
    return last, name
end

local function add_fragment(tvb, pinfo, tree, dispatcher)
    tree:add(b.id, tvb(L1_BYTES, 4))
    tree:add(b.offset, tvb(L1_BYTES + 4, 2))
    tree:add(b.total, tvb(L1_BYTES + 6, 2))
    local at = L1_BYTES + FRAGMENT_HEAD_BYTES
    local offset, total = tvb(L1_BYTES + 4, 2):uint(), tvb(L1_BYTES + 6, 2):uint()
    pinfo.cols.info:append(string.format(", fragment from %d of %d", offset, total))
    if offset == 0 and tvb:len() >= at + 8 then at = add_l2(tvb, tree, at, dispatcher) end
    if at < tvb:len() then tree:add(b.data, tvb(at)) end
end

function bus.dissector(tvb, pinfo, root)
    if tvb:len() < FIXED_BYTES or tvb(0, 1):bitfield(0, 2) ~= 1 then return 0 end
    pinfo.cols.protocol = "Anabranch bus"
    local dispatcher, target = tvb(0, 2):bitfield(4, 12), tvb(2, 2):uint()
    local tree = root:add(bus, tvb(), string.format("Anabranch between units, to %d", target))
    pinfo.cols.info = string.format("to %d, dispatcher %d", target, dispatcher)
    add_l1(tvb, tree)
    if tvb(0, 1):bitfield(2, 1) == 1 then
        add_fragment(tvb, pinfo, tree, dispatcher)
        return tvb:len()
    end
    local last, name = add_l2(tvb, tree, L1_BYTES, dispatcher)
    tree:append_text(", " .. name)
    pinfo.cols.info:append(", " .. name)
    if last + ETHERNET_BYTES > tvb:len() then
        tree:add_proto_expert_info(bus_bad, "The inner frame ends before its Ethernet header")
        return tvb:len()
    end
    tree:set_len(last)
    -- The inner frame is shown below; the columns stay those of the datagram.
    pinfo.cols.info:fence()
    Dissector.get("eth_withoutfcs"):call(tvb(last):tvb(), pinfo, root)
    return tvb:len()
end

-- Ports

local function follow(proto)
    local port
    local function register()
        local ports = DissectorTable.get("udp.port")
        if port then ports:remove(port, proto) end
        port = proto.prefs.port
        ports:add(port, proto)
    end
    proto.prefs_changed = register
    register()
end

follow(tunnel)
follow(bus)
