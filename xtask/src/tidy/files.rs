//! The files of the repository.

use std::path::Path;

use super::source::Source;

/// A text file.
pub struct File {
    /// Path from the workspace's folder, with `/`.
    pub path: String,
    /// Its contents.
    pub text: String,
}

impl File {
    /// Code and comments apart, if it is Rust.
    pub fn source(&self) -> Option<Source> {
        self.path.ends_with(".rs").then(|| Source::new(&self.text))
    }

    /// The package folder, such as `crates/packet` or `sim`.
    pub fn package(&self) -> &str {
        package(&self.path)
    }

    /// Whether only tests compile it, by where it stands. Modules inside a file: [`Source::is_test`].
    pub fn is_test(&self) -> bool {
        let inside = self.path.strip_prefix(self.package()).unwrap_or(&self.path);
        let name = inside.rsplit('/').next().unwrap_or_default();
        ["/tests/", "/benches/", "/examples/"].iter().any(|folder| inside.contains(folder))
            || name.starts_with("test")
            || name.ends_with("_tests.rs")
    }
}

/// The package folder of a file, such as `crates/packet` or `sim`.
pub fn package(path: &str) -> &str {
    let mut slashes = path.match_indices('/').map(|(at, _)| at);
    let depth = usize::from(path.starts_with("crates/") || path.starts_with("fuzz/"));
    slashes.nth(depth).map_or("", |at| &path[..at])
}

/// Folders that hold results and not sources, and what the tools keep.
const LEFT_OUT: &[&str] = &["target", "artifacts", "coverage", "corpus", "node_modules"];

/// Reads every text file below `root`, in the order of their paths.
///
/// # Errors
/// When a folder or file cannot be read.
pub fn read(root: &Path) -> anyhow::Result<Vec<File>> {
    let mut files = Vec::new();
    walk(root, "", &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn walk(root: &Path, folder: &str, files: &mut Vec<File>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let hidden =
            name.starts_with('.') && ![".ci", ".cargo", ".github", ".gitignore"].contains(&name.as_str());
        if hidden || LEFT_OUT.contains(&name.as_str()) {
            continue;
        }
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(root, &path, files)?;
        } else if kind.is_file()
            && let Ok(text) = String::from_utf8(std::fs::read(entry.path())?)
        {
            files.push(File { path, text });
        }
    }
    Ok(())
}
