//! The store: the bytes of [`cluster::manager::State`], whole, in one transaction each; and who may write them.
//!
//! Two of a kind: [`FileStore`] on this machine's disk, for one manager; [`crate::etcd`] for several.

use std::path::Path;

use anyhow::Context as _;
use redb::{Database, Durability, ReadableDatabase as _, TableDefinition};

/// The one table and the one key in it.
const TABLE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("cluster");
const KEY: &str = "state";
/// The term of the last start, 8 bytes big endian.
const TERM: &str = "term";

/// A state was not written; the one before is kept.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Another manager leads, or may: this one has nothing to say any more.
    #[error("another manager leads by now")]
    Lost,
    /// Something else.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// A place that outlives the process, and says which of several managers acts.
pub trait Store: Send {
    /// Tries to become the one that acts; its term, larger than all before. `None`: another one leads.
    ///
    /// # Errors
    /// When nobody can say.
    fn campaign(&mut self) -> anyhow::Result<Option<u64>>;

    /// Whether this manager still leads, as far as it can know without asking.
    fn leads(&self) -> bool;

    /// The manager that led when [`Store::campaign`] asked, if it was another one.
    fn leader(&self) -> Option<&str>;

    /// The state that was written last; `None`: never.
    ///
    /// # Errors
    /// When it cannot be read.
    fn load(&mut self) -> anyhow::Result<Option<Vec<u8>>>;

    /// Writes a state; when this returns it is on the disk.
    ///
    /// # Errors
    /// When it is not.
    fn save(&mut self, state: &[u8]) -> Result<(), SaveError>;
}

/// A file of this machine.
pub struct FileStore(Database);

impl FileStore {
    /// Opens it, or makes it. Only one manager can have it open.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder of {shown}"))?;
        }
        let what = || format!("cannot open the store {shown}; is another manager running?");
        Database::create(path).map(Self).with_context(what)
    }
}

impl FileStore {
    fn read(&self, key: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let read = self.0.begin_read()?;
        match read.open_table(TABLE) {
            Ok(table) => Ok(table.get(key)?.map(|bytes| bytes.value().to_vec())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        let mut write = self.0.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut table = write.open_table(TABLE)?;
            table.insert(key, value)?;
        }
        write.commit()?;
        Ok(())
    }
}

impl Store for FileStore {
    /// Nobody else can have the file open.
    fn campaign(&mut self) -> anyhow::Result<Option<u64>> {
        let last = self.read(TERM)?.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        let term = last + 1;
        self.write(TERM, &term.to_be_bytes())?;
        Ok(Some(term))
    }

    fn leads(&self) -> bool {
        true
    }

    fn leader(&self) -> Option<&str> {
        None
    }

    fn load(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        self.read(KEY)
    }

    fn save(&mut self, state: &[u8]) -> Result<(), SaveError> {
        self.write(KEY, state).map_err(SaveError::Failed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_was_written_is_there_after_a_restart_and_one_manager_has_it() {
        let folder = std::env::temp_dir().join(format!("anabranch-store-{}", std::process::id()));
        let path = folder.join("deep/cluster.redb");
        let mut store = FileStore::open(&path).unwrap();
        assert_eq!(store.load().unwrap(), None);
        assert_eq!((store.campaign().unwrap(), store.leads()), (Some(1), true));
        store.save(b"one").unwrap();
        store.save(b"two").unwrap();
        let second = FileStore::open(&path).err().map(|error| format!("{error:#}")).unwrap();
        assert!(second.contains("is another manager running?"), "{second}");
        drop(store);
        let mut store = FileStore::open(&path).unwrap();
        assert_eq!(store.load().unwrap().as_deref(), Some(&b"two"[..]));
        assert_eq!(store.campaign().unwrap(), Some(2), "every start has a term of its own");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
