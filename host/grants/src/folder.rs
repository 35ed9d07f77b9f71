//! Read-only folders, pinned by their content.
//!
//! The choice: a plugin is given a *tree of what the folder held when the run started*, served by the host, rather than a
//! handle of the operating system on the folder. A handle would hand through what does not repeat: the order in which the
//! file system lists names, times, inode numbers, and whatever somebody changes meanwhile. Here a path is looked up in a
//! table that `..` and links cannot leave, and a file is read whole and compared with its pinned hash before the plugin
//! sees a byte of it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;

/// Deepest folder inside a folder.
const DEPTH_MAX: usize = 64;

/// Why a folder was not pinned, or a file of it not read.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not a folder.
    #[error("`{path}` is not a folder")]
    NotAFolder {
        /// What was granted.
        path: PathBuf,
    },
    /// A link that leads out.
    #[error(
        "`{path}` is a link out of the granted folder, to `{target}`; replace it by a copy, or grant that folder too"
    )]
    LinkLeaves {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A link to a folder.
    #[error("`{path}` is a link to a folder, which a pinned tree cannot have; replace it by a copy")]
    LinkToFolder {
        /// The link.
        path: PathBuf,
    },
    /// Neither file nor folder.
    #[error("`{path}` is neither a file nor a folder")]
    Special {
        /// What it is.
        path: PathBuf,
    },
    /// A name that no plugin could spell.
    #[error("the name of `{path}` is not UTF-8")]
    Name {
        /// The file.
        path: PathBuf,
    },
    /// A run's folder.
    #[error("`{path}` is the folder of a run, which no plugin may see")]
    Run {
        /// The folder.
        path: PathBuf,
    },
    /// Too much of something.
    #[error("`{path}` goes past the limit {limit} of {value}")]
    Limit {
        /// The file or folder.
        path: PathBuf,
        /// Name of the limit.
        limit: &'static str,
        /// Its value.
        value: u64,
    },
    /// Another content than the pinned one.
    #[error("`{path}` has changed since the run started")]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

impl FolderError {
    fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { path, source }
    }
}

/// Why a path leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupError {
    /// There is nothing.
    NotFound,
    /// A part of it goes through a file.
    NotAFolder,
    /// It leaves the place that it is looked up from.
    Leaves,
}

/// A file or a folder of a tree, by its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(usize);

impl NodeId {
    /// The folder that was granted.
    pub const ROOT: Self = Self(0);

    /// A number that is unique in its tree and the same in every run.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0 as u64
    }
}

#[derive(Debug)]
enum Node {
    Folder(BTreeMap<String, NodeId>),
    File(File),
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    bytes: u64,
    hash: ContentHash,
    /// Shared by all who have the file open.
    content: Mutex<Weak<Vec<u8>>>,
}

/// A folder as it was when it was pinned.
#[derive(Debug)]
pub struct PinnedFolder {
    nodes: Vec<Node>,
    hash: ContentHash,
    bytes_max: u64,
}

impl PinnedFolder {
    /// Reads the folder once and pins it. Blocks.
    ///
    /// # Errors
    /// When something in it cannot be read, is no file and no folder, is a link that leaves it, or is too much.
    pub fn pin(path: &Path, limits: &Limits) -> Result<Self, FolderError> {
        let root = path.canonicalize().map_err(FolderError::read(path))?;
        if !root.is_dir() {
            return Err(FolderError::NotAFolder { path: path.to_owned() });
        }
        let mut walk = Walk { root: &root, limits, nodes: vec![], listing: vec![], files: 0, bytes: 0 };
        walk.folder(&root, "", 0)?;
        let hash = ContentHash::of(&walk.listing);
        Ok(Self { nodes: walk.nodes, hash, bytes_max: limits.folder_file_bytes_max })
    }

    /// Hash over the sorted relative paths of all files and folders and the content of all files.
    #[must_use]
    pub fn tree_hash(&self) -> ContentHash {
        self.hash
    }

    /// Length of a file; `None` of a folder.
    #[must_use]
    pub fn file_bytes(&self, node: NodeId) -> Option<u64> {
        match self.nodes.get(node.0) {
            Some(Node::File(file)) => Some(file.bytes),
            _ => None,
        }
    }

    /// What a folder holds, by name, in order; `None` of a file.
    #[must_use]
    pub fn children(&self, node: NodeId) -> Option<&BTreeMap<String, NodeId>> {
        match self.nodes.get(node.0) {
            Some(Node::Folder(children)) => Some(children),
            _ => None,
        }
    }

    /// Looks up a relative path, starting at `from`. `..` may not go above that.
    ///
    /// # Errors
    /// When it leads nowhere or out.
    pub fn lookup(&self, from: NodeId, path: &str) -> Result<NodeId, LookupError> {
        if path.starts_with('/') {
            return Err(LookupError::Leaves);
        }
        let mut above: Vec<NodeId> = vec![];
        let mut here = from;
        for part in path.split('/') {
            // `a/` and `a/.` ask for a folder, as `a/b` does.
            let children = self.children(here).ok_or(LookupError::NotAFolder)?;
            match part {
                "" | "." => {}
                ".." => here = above.pop().ok_or(LookupError::Leaves)?,
                name => {
                    above.push(here);
                    here = *children.get(name).ok_or(LookupError::NotFound)?;
                }
            }
        }
        Ok(here)
    }

    /// The content of a file, checked against its hash. Blocks.
    ///
    /// # Errors
    /// When it is no file, cannot be read, or has changed.
    pub fn read(&self, node: NodeId) -> Result<Arc<Vec<u8>>, FolderError> {
        let Some(Node::File(file)) = self.nodes.get(node.0) else {
            return Err(FolderError::Special { path: PathBuf::new() });
        };
        let mut content = file.content.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = content.upgrade() {
            return Ok(held);
        }
        let bytes = read_file(&file.path, self.bytes_max)?;
        if ContentHash::of(&bytes) != file.hash {
            return Err(FolderError::Changed { path: file.path.clone() });
        }
        let bytes = Arc::new(bytes);
        *content = Arc::downgrade(&bytes);
        Ok(bytes)
    }
}

/// Reads a file that is not longer than it may be, whatever it grows to meanwhile.
fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FolderError> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(FolderError::read(path))?;
    let mut bytes = vec![];
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes).map_err(FolderError::read(path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(FolderError::Limit { path: path.to_owned(), limit: "folder_file_bytes_max", value: bytes_max });
    }
    Ok(bytes)
}

struct Walk<'a> {
    root: &'a Path,
    limits: &'a Limits,
    nodes: Vec<Node>,
    /// What is hashed: of every file and folder, in order, its relative path and its content's hash.
    listing: Vec<u8>,
    files: u64,
    bytes: u64,
}

impl Walk<'_> {
    fn folder(&mut self, path: &Path, relative: &str, depth: usize) -> Result<NodeId, FolderError> {
        if crate::overlap::is_run_folder(path) {
            return Err(FolderError::Run { path: path.to_owned() });
        }
        if depth > DEPTH_MAX {
            let value = DEPTH_MAX as u64;
            return Err(FolderError::Limit { path: path.to_owned(), limit: "folder_depth_max", value });
        }
        let mut names = BTreeMap::new();
        for entry in std::fs::read_dir(path).map_err(FolderError::read(path))? {
            let entry = entry.map_err(FolderError::read(path))?;
            self.files += 1;
            if self.files > self.limits.folder_files_max {
                let value = self.limits.folder_files_max;
                return Err(FolderError::Limit { path: path.to_owned(), limit: "folder_files_max", value });
            }
            let name = entry.file_name().into_string().map_err(|_| FolderError::Name { path: entry.path() })?;
            names.insert(name, entry.path());
        }
        self.note(relative, None);
        let node = self.push(Node::Folder(BTreeMap::new()));
        let mut children = BTreeMap::new();
        for (name, path) in names {
            let relative = if relative.is_empty() { name.clone() } else { format!("{relative}/{name}") };
            let child = self.entry(&path, &relative, depth + 1)?;
            children.insert(name, child);
        }
        if let Some(place) = self.nodes.get_mut(node.0) {
            *place = Node::Folder(children);
        }
        Ok(node)
    }

    fn entry(&mut self, path: &Path, relative: &str, depth: usize) -> Result<NodeId, FolderError> {
        let kind = std::fs::symlink_metadata(path).map_err(FolderError::read(path))?.file_type();
        if kind.is_dir() {
            return self.folder(path, relative, depth);
        }
        let path = if kind.is_symlink() { self.follow(path)? } else { path.to_owned() };
        // What a link leads to may be anything, and opening a pipe would wait for ever.
        if !std::fs::metadata(&path).map_err(FolderError::read(&path))?.is_file() {
            return Err(FolderError::Special { path });
        }
        let content = read_file(&path, self.limits.folder_file_bytes_max)?;
        let bytes = content.len() as u64;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.folder_bytes_max {
            let value = self.limits.folder_bytes_max;
            return Err(FolderError::Limit { path, limit: "folder_bytes_max", value });
        }
        let hash = ContentHash::of(&content);
        self.note(relative, Some(hash));
        Ok(self.push(Node::File(File { path, bytes, hash, content: Mutex::default() })))
    }

    /// Where a link leads, which must be a file inside the folder.
    fn follow(&self, path: &Path) -> Result<PathBuf, FolderError> {
        let target = match path.canonicalize() {
            Ok(target) => target,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // A link to nothing: it could lead anywhere tomorrow.
                let target = std::fs::read_link(path).unwrap_or_default();
                return Err(FolderError::LinkLeaves { path: path.to_owned(), target });
            }
            Err(error) => return Err(FolderError::read(path)(error)),
        };
        if !target.starts_with(self.root) {
            return Err(FolderError::LinkLeaves { path: path.to_owned(), target });
        }
        if target.is_dir() {
            return Err(FolderError::LinkToFolder { path: path.to_owned() });
        }
        Ok(target)
    }

    fn note(&mut self, relative: &str, content: Option<ContentHash>) {
        // The length in front makes two lists of names with equal text differ.
        self.listing.extend((relative.len() as u64).to_le_bytes());
        self.listing.extend(relative.as_bytes());
        match content {
            None => self.listing.push(b'd'),
            Some(hash) => {
                self.listing.push(b'f');
                self.listing.extend(hash.as_bytes());
            }
        }
    }

    fn push(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn pin(folder: &tempfile::TempDir) -> Result<PinnedFolder, FolderError> {
        PinnedFolder::pin(folder.path(), &Limits::default())
    }

    #[test]
    fn the_hash_follows_from_names_and_content_alone() {
        let hash = |files: &[(&str, &str)]| pin(&folder(files)).unwrap().tree_hash();
        let one = hash(&[("a", "1"), ("b/c", "2")]);
        assert_eq!(one, hash(&[("b/c", "2"), ("a", "1")]));
        for other in
            [&[("a", "1"), ("b/c", "3")][..], &[("a", "1"), ("b/d", "2")], &[("a", "1"), ("b", "2")], &[("a", "1")]]
        {
            assert_ne!(one, hash(other), "{other:?}");
        }
        let with_empty = folder(&[("a", "1"), ("b/c", "2")]);
        std::fs::create_dir(with_empty.path().join("empty")).unwrap();
        assert_ne!(one, pin(&with_empty).unwrap().tree_hash());
    }

    #[test]
    fn paths_stay_inside() {
        let files = folder(&[("a", "1"), ("b/c", "22"), ("b/d/e", "3")]);
        let pinned = pin(&files).unwrap();
        let found = |from, path| pinned.lookup(from, path);
        let b = found(NodeId::ROOT, "b").unwrap();
        assert_eq!(found(NodeId::ROOT, "./b//c"), found(b, "c"));
        assert_eq!(found(NodeId::ROOT, "b/../a"), found(NodeId::ROOT, "a"));
        assert_eq!(found(b, "d/../c"), found(b, "c"));
        assert_eq!(found(b, "."), Ok(b));
        for path in ["..", "../a", "b/../..", "b/../../etc/passwd", "/etc/passwd", "/"] {
            assert_eq!(found(NodeId::ROOT, path), Err(LookupError::Leaves), "{path}");
        }
        assert_eq!(found(b, "../a"), Err(LookupError::Leaves), "a descriptor is a border too");
        assert_eq!(found(NodeId::ROOT, "a/"), Err(LookupError::NotAFolder));
        assert_eq!(found(NodeId::ROOT, "a/../b"), Err(LookupError::NotAFolder));
        assert_eq!(found(NodeId::ROOT, "no"), Err(LookupError::NotFound));
        let names: Vec<_> = pinned.children(NodeId::ROOT).unwrap().keys().collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(pinned.file_bytes(found(b, "c").unwrap()), Some(2));
    }

    #[test]
    fn a_file_that_changed_is_not_read() {
        let files = folder(&[("a", "1")]);
        let pinned = pin(&files).unwrap();
        let a = pinned.lookup(NodeId::ROOT, "a").unwrap();
        let held = pinned.read(a).unwrap();
        std::fs::write(files.path().join("a"), "2").unwrap();
        assert_eq!(**pinned.read(a).unwrap(), *b"1", "whoever has it open goes on with what it was");
        drop(held);
        assert!(matches!(pinned.read(a), Err(FolderError::Changed { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_leave() {
        use std::os::unix::fs::symlink;
        let outside = folder(&[("secret", "x")]);
        let files = folder(&[("a", "1"), ("b/c", "2")]);
        symlink("b/c", files.path().join("inner")).unwrap();
        let pinned = pin(&files).unwrap();
        let inner = pinned.lookup(NodeId::ROOT, "inner").unwrap();
        assert_eq!(**pinned.read(inner).unwrap(), *b"2");
        let place = files.path().join("link");
        for (target, folder_link) in [
            (outside.path().join("secret"), false),
            (outside.path().to_owned(), false),
            (PathBuf::from("../../../../../../etc/passwd"), false),
            (PathBuf::from("nowhere"), false),
            (PathBuf::from("b"), true),
            (PathBuf::from("."), true),
        ] {
            symlink(&target, &place).unwrap();
            match (pin(&files), folder_link) {
                (Err(FolderError::LinkLeaves { .. }), false) | (Err(FolderError::LinkToFolder { .. }), true) => {}
                (other, _) => panic!("{target:?}: {other:?}"),
            }
            std::fs::remove_file(&place).unwrap();
        }
        // Replaced by a link after it was pinned: the content decides.
        std::fs::remove_file(files.path().join("a")).unwrap();
        symlink(outside.path().join("secret"), files.path().join("a")).unwrap();
        let a = pinned.lookup(NodeId::ROOT, "a").unwrap();
        assert!(matches!(pinned.read(a), Err(FolderError::Changed { .. })));
    }

    #[test]
    fn limits_are_named() {
        let files = folder(&[("a", "12345"), ("b", "1")]);
        for (limits, expected) in [
            (Limits { folder_files_max: 1, ..Limits::default() }, "folder_files_max"),
            (Limits { folder_file_bytes_max: 4, ..Limits::default() }, "folder_file_bytes_max"),
            (Limits { folder_bytes_max: 5, ..Limits::default() }, "folder_bytes_max"),
        ] {
            match PinnedFolder::pin(files.path(), &limits) {
                Err(FolderError::Limit { limit, .. }) => assert_eq!(limit, expected),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            PinnedFolder::pin(&files.path().join("a"), &Limits::default()),
            Err(FolderError::NotAFolder { .. })
        ));
        assert!(matches!(
            PinnedFolder::pin(&files.path().join("no"), &Limits::default()),
            Err(FolderError::Read { .. })
        ));
    }

    #[test]
    fn a_runs_folder_is_never_part_of_it() {
        let files = folder(&[("a", "1"), ("runs/one/config.toml", ""), ("runs/one/store/db", "")]);
        assert!(matches!(pin(&files), Err(FolderError::Run { .. })));
    }
}
