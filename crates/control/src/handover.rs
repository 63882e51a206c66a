//! Flows that this process hands to the next one: a file beside the control socket.
//!
//! Written at a clean end, read by the next start, and unlinked when that has succeeded. It is of use for a minute and within one boot of the machine, and
//! nothing depends on it: a disk that is full, a file that is damaged, foreign or old only costs the flows that it had, and is
//! said. The layout stands in `docs/wire-flow-records.md`. It holds the secret key of the flow hash, so that only its owner may
//! read it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::Engine;
use engine::handover::{Arrivals, Placement, TakenOver};
use services::handover::Entry;
use services::handover::wire::HEAD_BYTES;
use steering::ownership::CORES_MAX;
use steering::table::{BucketTable, CORE_BUCKETS};
use steering::toeplitz::KEY_BYTES;

use crate::status::TakenOverStatus;

/// Begins every file; the last byte is the version.
const MAGIC: [u8; 8] = *b"anaflow\x01";
/// Bytes in front of the bucket table: magic, boot, time, cores, key, length of the table.
const HEAD: usize = 8 + 16 + 8 + 1 + KEY_BYTES + 2;
const CHECKSUM_BYTES: u64 = 8;
/// Records of one file, bytes: some eight million flows.
const RECORDS_BYTES_MAX: u64 = 1 << 30;
/// A file that is older is not used: its flows have been given up by their ends, or are somewhere else.
const AGE_MAX: Duration = Duration::from_secs(60);
/// The end waits so long for the workers, and the start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it belongs to somebody else, or others may write it")]
    Foreign,
    #[error("it is damaged, or of another version")]
    Damaged,
    #[error("the machine was started anew since")]
    OtherBoot,
    #[error("it is {0} s old")]
    Old(u64),
}

/// The file of a control socket.
#[must_use]
pub fn path(control_socket: &Path) -> PathBuf {
    control_socket.with_extension("flows")
}

/// Flows of the process before, if there are some. They wait for another start until somebody discards them ([`discard`]); of those that
/// are of no use it is said why, and they are gone.
#[must_use]
pub fn waiting(path: &Path) -> Option<Arrivals> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path);
    if let Err(error) = &opened
        && error.kind() == io::ErrorKind::NotFound
    {
        return None;
    }
    match opened.map_err(Unusable::from).and_then(read) {
        Ok(arrivals) => Some(arrivals),
        Err(error) => {
            discard(path);
            tracing::warn!("the flows of the run before are lost: {}: {error}", path.display());
            None
        }
    }
}

/// Stops the engine's workers and writes their flows for the next process. Whether there are any.
#[must_use]
pub fn give(engine: &mut Engine, path: &Path) -> bool {
    match write(engine, path) {
        Ok(written) => {
            if !written.whole {
                tracing::warn!("not all flows are handed to the next run: too many, or a core hangs");
            }
            tracing::info!(flows = written.records, "flows wait for the next run");
            written.records > 0
        }
        Err(error) => {
            tracing::warn!(
                "{} cannot be written ({error}): the next run begins without flows",
                path.display()
            );
            false
        }
    }
}

/// Forgets what was written.
pub fn discard(path: &Path) {
    let _ = fs::remove_file(path);
}

/// Result of a hand-over for status and log.
#[must_use]
pub fn status(taken: &TakenOver) -> TakenOverStatus {
    let lost: BTreeMap<String, u64> =
        taken.refusals.iter().map(|(reason, count)| (reason.to_string(), count)).collect();
    TakenOverStatus { flows: taken.flows, lost }
}

/// The same in words.
#[must_use]
pub fn text(taken: &TakenOverStatus) -> String {
    let lost: u64 = taken.lost.values().sum();
    let reasons: Vec<String> = taken.lost.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
    format!("{} flows taken over from the run before, {lost} not{reasons}", taken.flows)
}

/// Records that were written.
struct Written {
    records: u64,
    whole: bool,
}

fn write(engine: &mut Engine, path: &Path) -> io::Result<Written> {
    let temporary = path.with_extension("flows-new");
    let result = write_to(engine, &temporary).and_then(|written| {
        if written.records > 0 {
            fs::rename(&temporary, path)?;
        }
        Ok(written)
    });
    if !matches!(result, Ok(Written { records: 1.., .. })) {
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_to(engine: &mut Engine, path: &Path) -> io::Result<Written> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    let _ = fs::remove_file(path);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut out = Summed::new(BufWriter::with_capacity(1 << 20, file));
    let table = engine.placement();
    out.write_all(&head(&table, boot_id()?, linux::clock::monotonic_ns()))?;
    let (mut bytes, mut records, mut error) = (0, 0, None);
    let whole = engine.export(PATIENCE, &mut |chunk| {
        bytes += chunk.len() as u64;
        if bytes > RECORDS_BYTES_MAX {
            return false;
        }
        records += count(chunk);
        error = out.write_all(chunk).err();
        error.is_none()
    });
    if let Some(error) = error {
        return Err(error);
    }
    out.finish()?;
    Ok(Written { records, whole })
}

fn head(placement: &Placement, boot: [u8; 16], now_ns: u64) -> Vec<u8> {
    let table = placement.table.encode_with_chains();
    let mut head = Vec::with_capacity(HEAD + table.len());
    head.extend(MAGIC);
    head.extend(boot);
    head.extend(now_ns.to_be_bytes());
    head.push(placement.cores);
    head.extend(placement.key);
    // 128 buckets and their chains are a kilobyte at most.
    head.extend((table.len() as u16).to_be_bytes());
    head.extend(table);
    head
}

/// Records of a chunk.
fn count(mut chunk: &[u8]) -> u64 {
    let mut records = 0;
    while let Ok(length) = Entry::length(chunk) {
        let Some(rest) = chunk.get(length..) else { break };
        chunk = rest;
        records += 1;
    }
    records
}

fn read(mut file: File) -> Result<Arrivals, Unusable> {
    let metadata = file.metadata()?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if !own || metadata.mode() & 0o077 != 0 || !metadata.is_file() {
        return Err(Unusable::Foreign);
    }
    let bytes = metadata.len().checked_sub(CHECKSUM_BYTES).ok_or(Unusable::Damaged)?;
    if bytes > RECORDS_BYTES_MAX + (1 << 20) {
        return Err(Unusable::Damaged);
    }
    check_sum(&mut file, bytes)?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut head = [0; HEAD];
    reader.read_exact(&mut head).map_err(|_| Unusable::Damaged)?;
    let mut rest = &head[..];
    if take_array(&mut rest) != MAGIC {
        return Err(Unusable::Damaged);
    }
    if take_array(&mut rest) != boot_id()? {
        return Err(Unusable::OtherBoot);
    }
    let written_ns = u64::from_be_bytes(take_array(&mut rest));
    let away = linux::clock::monotonic_ns().checked_sub(written_ns).map(Duration::from_nanos);
    let away = away.ok_or(Unusable::OtherBoot)?;
    if away > AGE_MAX {
        return Err(Unusable::Old(away.as_secs()));
    }
    let [cores] = take_array(&mut rest);
    let key = take_array(&mut rest);
    let table_bytes = u16::from_be_bytes(take_array(&mut rest));
    let mut table = vec![0; table_bytes.into()];
    reader.read_exact(&mut table).map_err(|_| Unusable::Damaged)?;
    let table = BucketTable::decode_at_most(&table, CORE_BUCKETS).map_err(|_| Unusable::Damaged)?;
    if cores == 0 || cores > CORES_MAX {
        return Err(Unusable::Damaged);
    }
    let left = bytes.checked_sub((HEAD + usize::from(table_bytes)) as u64).ok_or(Unusable::Damaged)?;
    Ok(Arrivals {
        placement: Placement { cores, key, table },
        away_ms: u32::try_from(away.as_millis()).unwrap_or(u32::MAX),
        deadline: Instant::now() + PATIENCE,
        records: Box::new(Records { reader, left }),
    })
}

/// The next `N` bytes of `rest`.
fn take_array<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, others) = rest.split_first_chunk().unwrap_or((&[0; N], &[]));
    *rest = others;
    *first
}

/// Reads a whole file once: it ends with the sum of all before.
fn check_sum(file: &mut File, bytes: u64) -> Result<(), Unusable> {
    let mut sum = Sum::default();
    let mut left = bytes;
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let part = buffer.get_mut(..wanted).unwrap_or_default();
        file.read_exact(part)?;
        sum.add(part);
        left -= wanted as u64;
    }
    let mut told = [0; CHECKSUM_BYTES as usize];
    file.read_exact(&mut told)?;
    if u64::from_be_bytes(told) != sum.0 {
        return Err(Unusable::Damaged);
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(())
}

/// Records of a file, one by one.
struct Records {
    reader: BufReader<File>,
    left: u64,
}

impl Iterator for Records {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut record = vec![0; HEAD_BYTES];
        self.left = self.left.checked_sub(HEAD_BYTES as u64)?;
        self.reader.read_exact(&mut record).ok()?;
        let length = Entry::length(&record).ok()?;
        self.left = self.left.checked_sub((length - HEAD_BYTES) as u64)?;
        record.resize(length, 0);
        self.reader.read_exact(record.get_mut(HEAD_BYTES..)?).ok()?;
        Some(record)
    }
}

/// Sum over bytes: FNV-1a, 64 bits. It finds damage and not forgery, which the file's mode prevents.
#[derive(Clone, Copy)]
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        self.0 =
            bytes.iter().fold(self.0, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    }
}

/// Writer that sums up what it writes.
struct Summed<W: Write> {
    out: W,
    sum: Sum,
}

impl<W: Write> Summed<W> {
    fn new(out: W) -> Self {
        Self { out, sum: Sum::default() }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.add(bytes);
        self.out.write_all(bytes)
    }

    /// Ends with the sum.
    fn finish(mut self) -> io::Result<()> {
        self.out.write_all(&self.sum.0.to_be_bytes())?;
        self.out.flush()
    }
}

/// Number of this boot of the machine.
fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(number.to_be_bytes())
}

#[cfg(test)]
mod tests;
