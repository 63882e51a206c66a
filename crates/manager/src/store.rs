//! The store: the bytes of [`cluster::manager::State`], whole, in one transaction each.

use std::path::Path;

use anyhow::Context as _;
use redb::{Database, Durability, ReadableDatabase as _, TableDefinition};

/// The one table and the one key in it.
const TABLE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("cluster");
const KEY: &str = "state";

/// A place that outlives the process.
pub trait Store: Send {
    /// The state that was written last; `None`: never.
    ///
    /// # Errors
    /// When it cannot be read.
    fn load(&mut self) -> anyhow::Result<Option<Vec<u8>>>;

    /// Writes a state; when this returns it is on the disk.
    ///
    /// # Errors
    /// When it is not; the one before is kept then.
    fn save(&mut self, state: &[u8]) -> anyhow::Result<()>;
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

impl Store for FileStore {
    fn load(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let read = self.0.begin_read()?;
        match read.open_table(TABLE) {
            Ok(table) => Ok(table.get(KEY)?.map(|bytes| bytes.value().to_vec())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn save(&mut self, state: &[u8]) -> anyhow::Result<()> {
        let mut write = self.0.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut table = write.open_table(TABLE)?;
            table.insert(KEY, state)?;
        }
        write.commit()?;
        Ok(())
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
        store.save(b"one").unwrap();
        store.save(b"two").unwrap();
        let second = FileStore::open(&path).err().map(|error| format!("{error:#}")).unwrap();
        assert!(second.contains("is another manager running?"), "{second}");
        drop(store);
        assert_eq!(FileStore::open(&path).unwrap().load().unwrap().as_deref(), Some(&b"two"[..]));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
