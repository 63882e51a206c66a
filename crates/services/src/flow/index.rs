//! From hash to flow: extendible hashing in small segments.
//!
//! A directory of 2^depth places maps the low bits of a hash to a *segment*: an open-addressed table of some 1,100
//! entries in buckets of eight, one bucket a cache line. A segment that gets too full is given two more *units* of 16
//! buckets, and when it has nearly doubled it is split into two. So memory follows the number of flows in small steps,
//! nothing is ever rehashed as a whole, and the longest pause is rewriting one segment. Units come from a pool and go
//! back to it: sizes change, but memory does not fragment.
//!
//! An entry holds 32 bits of hash (enough to rewrite a segment without looking at the flows) and a reference of 32 bits.
//! Within a segment, an entry is in its home bucket or in one behind it with only full ones between. Removal keeps that:
//! no tombstones. What flows have left is used by later ones; the index does not shrink.

use super::bucket::{BUCKET, Bucket, Reference};
use packet::prefetch;

/// Buckets of a unit: 1 KB, 128 entries.
const UNIT: usize = 16;
/// Units are allocated so many at a time: 4 MB, whole huge pages. Pages are touched when units are used.
const POOL_CHUNK: usize = 4_096;
/// The first segment has so many units, a half after a split at least as many.
const UNITS_MIN: usize = 8;
/// A segment of so many units is split when it is too full.
const UNITS_MAX: usize = 14;
/// Units that a segment is given or loses at a time: each time it is written anew.
const UNITS_STEP: usize = 2;
/// No segment has more buckets; their numbers are bytes.
const BUCKETS_MAX: usize = 256;
const _: () = assert!(UNIT * UNITS_MAX <= BUCKETS_MAX);
/// A unit should not hold more entries than four fifths of its places.
const UNIT_FULL: usize = UNIT * BUCKET * 4 / 5;
/// The directory has at most 2^21 places: room for more than two thousand million entries.
const DEPTH_MAX: u8 = 21;

/// Where all units are.
struct Pool {
    chunks: Vec<Vec<Bucket>>,
    /// So many were ever taken.
    units: u32,
    free: Vec<u32>,
}

impl Pool {
    fn take(&mut self) -> u32 {
        if let Some(unit) = self.free.pop() {
            return unit;
        }
        let unit = self.units;
        self.units += 1;
        if unit as usize == self.chunks.len() * POOL_CHUNK {
            self.chunks.push(Vec::with_capacity(POOL_CHUNK * UNIT));
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.extend_from_slice(&[Bucket::EMPTY; UNIT]);
        }
        unit
    }

    #[inline]
    fn bucket(&self, unit: u32, bucket: usize) -> Option<&Bucket> {
        let unit = unit as usize;
        self.chunks.get(unit / POOL_CHUNK)?.get(unit % POOL_CHUNK * UNIT + bucket)
    }

    #[inline]
    fn bucket_mut(&mut self, unit: u32, bucket: usize) -> Option<&mut Bucket> {
        let unit = unit as usize;
        self.chunks.get_mut(unit / POOL_CHUNK)?.get_mut(unit % POOL_CHUNK * UNIT + bucket)
    }

    fn unit(&self, unit: u32) -> &[Bucket] {
        let unit = unit as usize;
        let chunk = self.chunks.get(unit / POOL_CHUNK);
        chunk.and_then(|chunk| chunk.chunks_exact(UNIT).nth(unit % POOL_CHUNK)).unwrap_or_default()
    }

    fn unit_mut(&mut self, unit: u32) -> &mut [Bucket] {
        let unit = unit as usize;
        let chunk = self.chunks.get_mut(unit / POOL_CHUNK);
        chunk.and_then(|chunk| chunk.chunks_exact_mut(UNIT).nth(unit % POOL_CHUNK)).unwrap_or_default()
    }
}

/// One line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Segment {
    units: [u32; UNITS_MAX],
    /// Entries in it.
    used: u16,
    /// So many of `units` are its.
    len: u8,
    /// So many low bits of the hash are the same for all its entries.
    depth: u8,
}

const _: () = assert!(size_of::<Segment>() == 64);

impl Segment {
    const NONE: Self = Self { units: [0; UNITS_MAX], used: 0, len: 0, depth: 0 };

    #[inline]
    fn units(&self) -> &[u32] {
        self.units.get(..usize::from(self.len)).unwrap_or_default()
    }

    #[inline]
    fn buckets(&self) -> usize {
        usize::from(self.len) * UNIT
    }

    #[inline]
    fn home(&self, hash: u32) -> usize {
        home(hash, self.buckets())
    }

    #[inline]
    fn after(&self, bucket: usize) -> usize {
        if bucket + 1 < self.buckets() { bucket + 1 } else { 0 }
    }

    fn is_too_full(&self) -> bool {
        usize::from(self.used) >= usize::from(self.len) * UNIT_FULL
    }

    fn is_full(&self) -> bool {
        usize::from(self.used) >= self.buckets() * BUCKET
    }

    #[inline]
    fn bucket<'a>(&self, pool: &'a Pool, bucket: usize) -> Option<&'a Bucket> {
        pool.bucket(*self.units.get(bucket / UNIT)?, bucket % UNIT)
    }

    #[inline]
    fn bucket_mut<'a>(&self, pool: &'a mut Pool, bucket: usize) -> Option<&'a mut Bucket> {
        pool.bucket_mut(*self.units.get(bucket / UNIT)?, bucket % UNIT)
    }

    /// Gives it as many units as it needs for so many entries.
    fn resize(&mut self, entries: usize, pool: &mut Pool) {
        let wanted = units_for(entries);
        for (at, place) in self.units.iter_mut().enumerate() {
            let has = at < usize::from(self.len);
            if has && at >= wanted {
                pool.free.push(*place);
            } else if !has && at < wanted {
                *place = pool.take();
            }
        }
        self.len = wanted as u8;
    }
}

/// Units for so many entries, `UNITS_MAX` at most.
fn units_for(entries: usize) -> usize {
    (entries / UNIT_FULL + 1).next_multiple_of(UNITS_STEP).clamp(UNITS_MIN, UNITS_MAX)
}

/// The place of a hash among so many buckets; its high bits count.
#[inline]
fn home(hash: u32, buckets: usize) -> usize {
    ((u64::from(hash) * buckets as u64) >> 32) as usize
}

/// Where segments are written anew.
struct Bench {
    buckets: Box<[Bucket; BUCKETS_MAX]>,
    fills: [u8; BUCKETS_MAX],
}

impl Bench {
    fn new() -> Self {
        Self { buckets: Box::new([Bucket::EMPTY; BUCKETS_MAX]), fills: [0; BUCKETS_MAX] }
    }

    /// Lays out those entries of `from` whose hash agrees with `pattern` in the bits of `mask`, among so many buckets.
    /// Never more than fit, as a segment is not given more entries than it has places.
    fn lay_out(&mut self, from: &Segment, pool: &Pool, buckets: usize, [mask, pattern]: [u32; 2]) {
        for (bucket, fill) in self.buckets.iter_mut().zip(&mut self.fills).take(buckets) {
            *bucket = Bucket::EMPTY;
            *fill = 0;
        }
        for bucket in from.units().iter().flat_map(|unit| pool.unit(*unit)) {
            for (hash, reference) in bucket.places() {
                if reference == 0 || hash & mask != pattern {
                    continue;
                }
                let mut at = home(hash, buckets);
                while usize::from(self.fills[at % BUCKETS_MAX]) >= BUCKET {
                    at = if at + 1 < buckets { at + 1 } else { 0 };
                }
                let fill = &mut self.fills[at % BUCKETS_MAX];
                self.buckets[at % BUCKETS_MAX].set(usize::from(*fill), hash, reference);
                *fill += 1;
            }
        }
    }

    /// Gives the segment what was laid out for it.
    fn write(&self, segment: &mut Segment, pool: &mut Pool, used: usize) {
        segment.used = used as u16;
        for (unit, content) in segment.units().iter().zip(self.buckets.chunks_exact(UNIT)) {
            pool.unit_mut(*unit).copy_from_slice(content);
        }
    }
}

/// The index. Bits 32 to 63 of a hash are used.
pub(super) struct Index {
    /// Segment of each pattern of low bits; 2^depth places.
    directory: Vec<u32>,
    segments: Vec<Segment>,
    depth: u8,
    pool: Pool,
    bench: Bench,
}

impl Index {
    /// An empty one; memory for the lists of `entries_max` is set aside, but not touched.
    pub(super) fn new(entries_max: usize) -> Self {
        let segments_max = entries_max / (UNITS_MIN * UNIT_FULL * 3 / 4) + 1;
        let mut pool = Pool {
            chunks: Vec::with_capacity(segments_max / 32 + 1),
            units: 0,
            free: Vec::with_capacity(64),
        };
        let mut first = Segment::NONE;
        first.resize(0, &mut pool);
        let mut directory = Vec::with_capacity(segments_max.next_power_of_two());
        let mut segments = Vec::with_capacity(segments_max);
        directory.push(0);
        segments.push(first);
        Self { directory, segments, depth: 0, pool, bench: Bench::new() }
    }

    #[inline]
    fn number(&self, hash: u32) -> usize {
        let place = hash as usize & (self.directory.len() - 1);
        self.directory.get(place).map_or(0, |number| *number as usize)
    }

    /// Asks for the line of the hash's home bucket.
    #[inline]
    pub(super) fn prefetch(&self, hash: u64) {
        let hash = (hash >> 32) as u32;
        if let Some(segment) = self.segments.get(self.number(hash))
            && let Some(bucket) = segment.bucket(&self.pool, segment.home(hash))
        {
            prefetch::read(bucket);
        }
    }

    /// The first answer of `check` about an entry with this hash.
    #[inline]
    pub(super) fn find<T>(&self, hash: u64, mut check: impl FnMut(Reference) -> Option<T>) -> Option<T> {
        let hash = (hash >> 32) as u32;
        let segment = self.segments.get(self.number(hash))?;
        let mut at = segment.home(hash);
        for _ in 0..segment.buckets() {
            let bucket = segment.bucket(&self.pool, at)?;
            for place in bucket.hits(hash) {
                let reference = bucket.reference(place);
                if reference != 0
                    && let Some(found) = check(reference)
                {
                    return Some(found);
                }
            }
            if !bucket.empties().is_empty() {
                return None;
            }
            at = segment.after(at);
        }
        None
    }

    /// The first entry with this hash in its home bucket or those behind it; 0 when there is none.
    #[inline]
    pub(super) fn first(&self, hash: u64) -> Reference {
        self.find(hash, Some).unwrap_or(0)
    }

    /// Adds an entry, not looking whether it is there. False when there is no room.
    pub(super) fn insert(&mut self, hash: u64, reference: Reference) -> bool {
        let hash = (hash >> 32) as u32;
        let mut number = self.number(hash);
        if self.segments.get(number).is_some_and(Segment::is_too_full) {
            self.grow(number, hash);
            number = self.number(hash);
        }
        let Some(segment) = self.segments.get_mut(number).filter(|segment| !segment.is_full()) else {
            return false;
        };
        let mut at = segment.home(hash);
        for _ in 0..segment.buckets() {
            let Some(bucket) = segment.bucket_mut(&mut self.pool, at) else { return false };
            if let Some(place) = bucket.empties().next() {
                bucket.set(place, hash, reference);
                segment.used += 1;
                return true;
            }
            at = segment.after(at);
        }
        false
    }

    /// Takes an entry out; false when it is not there.
    pub(super) fn remove(&mut self, hash: u64, reference: Reference) -> bool {
        let hash = (hash >> 32) as u32;
        let number = self.number(hash);
        let Some(segment) = self.segments.get_mut(number) else { return false };
        let mut at = segment.home(hash);
        for _ in 0..segment.buckets() {
            let Some(bucket) = segment.bucket_mut(&mut self.pool, at) else { return false };
            let full = bucket.empties().is_empty();
            if let Some(place) = bucket.position(reference) {
                bucket.set(place, 0, 0);
                segment.used -= 1;
                if full {
                    fill_hole(segment, &mut self.pool, at);
                }
                return true;
            }
            if !full {
                return false;
            }
            at = segment.after(at);
        }
        false
    }

    /// Entries in it.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.segments.iter().map(|segment| usize::from(segment.used)).sum()
    }

    /// Bytes that were ever written, the bench left out: it is there once.
    #[cfg(test)]
    pub(super) fn touched_bytes(&self) -> usize {
        self.pool.units as usize * UNIT * size_of::<Bucket>()
            + self.segments.len() * size_of::<Segment>()
            + self.directory.len() * size_of::<u32>()
    }

    /// Bytes allocated.
    pub(super) fn memory_bytes(&self) -> usize {
        self.pool.chunks.len() * POOL_CHUNK * UNIT * size_of::<Bucket>()
            + self.pool.chunks.capacity() * size_of::<Vec<Bucket>>()
            + self.pool.free.capacity() * size_of::<u32>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.directory.capacity() * size_of::<u32>()
            + size_of_val(&*self.bench.buckets)
    }

    /// Gives the segment of that number, to which `hash` belongs, more units, or splits it.
    fn grow(&mut self, number: usize, hash: u32) {
        let Self { directory, segments, depth, pool, bench } = self;
        let Some(segment) = segments.get_mut(number) else { return };
        if usize::from(segment.len) < UNITS_MAX {
            let entries = usize::from(segment.used);
            bench.lay_out(segment, pool, units_for(entries) * UNIT, [0, 0]);
            segment.resize(entries, pool);
            bench.write(segment, pool, entries);
            return;
        }
        // A seeded hash does not get there.
        if segment.depth >= DEPTH_MAX {
            return;
        }
        let bit = 1u32 << segment.depth;
        let entries = segment.units().iter().flat_map(|unit| pool.unit(*unit)).flat_map(Bucket::places);
        let upper_entries = entries.filter(|(hash, reference)| *reference != 0 && hash & bit != 0).count();
        let lower_entries = usize::from(segment.used) - upper_entries;
        segment.depth += 1;
        let mut upper = Segment { depth: segment.depth, ..Segment::NONE };
        upper.resize(upper_entries, pool);
        bench.lay_out(segment, pool, upper.buckets(), [bit, bit]);
        bench.write(&mut upper, pool, upper_entries);
        bench.lay_out(segment, pool, units_for(lower_entries) * UNIT, [bit, 0]);
        segment.resize(lower_entries, pool);
        bench.write(segment, pool, lower_entries);
        if upper.depth > *depth {
            directory.extend_from_within(..);
            *depth = upper.depth;
        }
        let first = (hash & (bit - 1) | bit) as usize;
        for place in directory.iter_mut().skip(first).step_by(1 << upper.depth) {
            *place = segments.len() as u32;
        }
        segments.push(upper);
    }
}

/// Bucket `hole` was full and is not any more: what had to go past it comes back, and so on from where that was.
fn fill_hole(segment: &Segment, pool: &mut Pool, mut hole: usize) {
    let buckets = segment.buckets();
    let mut at = hole;
    let mut distance = 0;
    for _ in 1..buckets {
        at = segment.after(at);
        distance += 1;
        let Some(bucket) = segment.bucket(pool, at).copied() else { return };
        let last = !bucket.empties().is_empty();
        let wanderer = bucket.places().enumerate().find(|(_, (hash, reference))| {
            let home = segment.home(*hash);
            let away = if at >= home { at - home } else { at + buckets - home };
            *reference != 0 && away >= distance
        });
        if let Some((place, (hash, reference))) = wanderer {
            if let Some(target) = segment.bucket_mut(pool, hole)
                && let Some(free) = target.empties().next()
            {
                target.set(free, hash, reference);
            }
            if let Some(source) = segment.bucket_mut(pool, at) {
                source.set(place, 0, 0);
            }
            hole = at;
            distance = 0;
        }
        if last {
            return;
        }
    }
}
