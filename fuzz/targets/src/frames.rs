//! Plaintext of data datagrams, and the tables in it.

use std::sync::Arc;

use steering::table::{BUCKETS_MAX, BucketTable};
use tunnel::frame::{Frame, Frames};
use tunnel::hello::ProcessorInfo;
use tunnel::memory::{BondMemory, NodeMemory, Share};
use tunnel::reassemble::{BYTES_MAX, PACKETS_MAX, Reassembler, TIMEOUT_MS};
use tunnel::time::Time;

/// Every frame that is read can be written and is then read as the same frame; pieces are put together within bounds.
pub fn frames(data: &[u8]) {
    let memory = Arc::new(BondMemory::new(Arc::<NodeMemory>::default(), 1));
    let share = Share::new(Arc::clone(&memory));
    let mut pieces = Reassembler::new(PACKETS_MAX, BYTES_MAX, TIMEOUT_MS, share);
    let mut now = Time::ZERO;
    for frame in Frames::new(data) {
        let Ok(frame) = frame else { return };
        rewritten(&frame);
        match frame {
            Frame::Packet { start, body, .. } => assert_eq!(&data[start..start + body.len()], body),
            Frame::Piece { head, start, body } => {
                assert_eq!(&data[start..start + body.len()], body);
                if let Ok(Some(whole)) = pieces.push(now, 0, &head, body) {
                    assert_eq!(whole.bytes.len(), usize::from(head.total));
                }
                assert!(pieces.len() <= PACKETS_MAX);
                // A place, and the bytes that came; counted in grains.
                let most = pieces.len() * 2_048 + data.len() + (96 << 10);
                assert!(memory.bytes() <= most, "{} bytes are kept", memory.bytes());
            }
            Frame::Report(report) => assert_eq!(report.entries().count(), report.len()),
            Frame::Nack(nack) => drop(nack.ranges().map(|range| range.count).max()),
            Frame::ProcessorInfo(body) => processor_info(body),
            _ => {}
        }
        now = now.plus_ms(7);
    }
    pieces.expire(now.plus_ms(2 * TIMEOUT_MS));
    assert!(pieces.is_empty(), "pieces outlive their time");
}

/// The frame alone in a datagram is the same frame. Where its body stands may differ.
fn rewritten(frame: &Frame<'_>) {
    let mut out = vec![0; frame.encoded_len()];
    let end = frame.write(&mut out, 0);
    assert_eq!(end, Some(out.len()), "{frame:?} is not written as long as it says");
    let mut again = Frames::new(&out);
    let same = match (again.next(), *frame) {
        (Some(Ok(Frame::Packet { head, body, .. })), Frame::Packet { head: head_0, body: body_0, .. }) => {
            head == head_0 && body == body_0
        }
        (Some(Ok(Frame::Piece { head, body, .. })), Frame::Piece { head: head_0, body: body_0, .. }) => {
            head == head_0 && body == body_0
        }
        (Some(Ok(read)), written) => read == written,
        _ => false,
    };
    assert!(same, "{frame:?} is read back as something else");
    assert!(again.next().is_none(), "{frame:?} leaves something behind");
}

fn processor_info(data: &[u8]) {
    let Ok(info) = ProcessorInfo::decode(data) else { return };
    assert!(!info.usable.is_empty() && info.usable.iter().all(|core| core < info.cores));
    assert!(info.table.owners().iter().all(|owner| *owner < u16::from(info.cores)));
    let again = info.encode().ok().and_then(|bytes| ProcessorInfo::decode(&bytes).ok());
    assert!(again == Some(info), "processor information is read back as something else");
}

/// A table that is read is written as bytes that are the same table, never larger than what arrived could mean; the same
/// for the processor information around it.
pub fn table(data: &[u8]) {
    processor_info(data);
    let Ok(table) = BucketTable::decode(data) else { return };
    assert!(table.buckets() <= BUCKETS_MAX && table.buckets().is_power_of_two());
    for bucket in [0, table.buckets() / 2, table.buckets() - 1] {
        assert_eq!(table.owner(bucket), table.owners()[bucket]);
        assert!(!table.chain(bucket).contains(&table.owner(bucket)), "an owner in its own chain");
    }
    let again = BucketTable::decode(&table.encode_with_chains());
    assert!(again.as_ref() == Ok(&table), "the table is read back as something else");
    let bare = BucketTable::decode(&table.encode());
    assert!(bare.is_ok_and(|bare| bare.owners() == table.owners() && bare.era() == table.era()));
}
