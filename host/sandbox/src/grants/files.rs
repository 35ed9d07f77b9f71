//! `wasi:filesystem` of tools: the granted folders, and nothing else.
//!
//! wasmtime-wasi's own implementation hands out the operating system's folders, and what those tell (order of names, times,
//! inodes) does not repeat. This one serves the pinned tree. It is linked over wasmtime-wasi's for tools alone; the types of
//! its resources are fixed by wasmtime-wasi, so a handle's number is what is shared and the table holds entries of ours.

use std::sync::Arc;

use bytes::Bytes;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_grants::{FolderError, LookupError, NodeId, PinnedFolder};
use wasmtime::component::{HasSelf, Linker, Resource};
use wasmtime_wasi::p2::bindings::filesystem::preopens;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    self, Advice, Descriptor, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry, DirectoryEntryStream,
    ErrorCode, MetadataHashValue, NewTimestamp, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::pipe::MemoryInputPipe;
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, FsError, FsResult};

use super::ToolData;
use crate::fault::Stop;

/// Most bytes that one `read` returns; more is read by asking again.
const READ_BYTES_MAX: u64 = 64 << 10;

/// An open file or folder.
struct Opened {
    folder: Arc<PinnedFolder>,
    node: NodeId,
    /// Number of the grant, so that hashes of two folders differ.
    grant: u64,
    content: Option<Arc<Vec<u8>>>,
}

/// A folder being listed.
struct Listing {
    entries: std::vec::IntoIter<DirectoryEntry>,
}

/// Content that a stream reads from without copying it.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Links the granted folders over wasmtime-wasi's.
pub(crate) fn link_files(linker: &mut Linker<ToolData>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    types::add_to_linker::<_, HasSelf<ToolData>>(linker, |state| state)?;
    preopens::add_to_linker::<_, HasSelf<ToolData>>(linker, |state| state)?;
    linker.allow_shadowing(false);
    Ok(())
}

fn kind(folder: &PinnedFolder, node: NodeId) -> DescriptorType {
    if folder.children(node).is_some() { DescriptorType::Directory } else { DescriptorType::RegularFile }
}

fn stat(folder: &PinnedFolder, node: NodeId) -> DescriptorStat {
    DescriptorStat {
        type_: kind(folder, node),
        link_count: 1,
        size: folder.file_bytes(node).unwrap_or(0),
        data_access_timestamp: None,
        data_modification_timestamp: None,
        status_change_timestamp: None,
    }
}

fn read_only<T>() -> FsResult<T> {
    Err(ErrorCode::ReadOnly.into())
}

impl ToolData {
    fn opened(&self, descriptor: &Resource<Descriptor>) -> FsResult<&Opened> {
        Ok(self.table.get(&Resource::<Opened>::new_borrow(descriptor.rep()))?)
    }

    fn hand_out(&mut self, opened: Opened) -> wasmtime::Result<Resource<Descriptor>> {
        Ok(Resource::new_own(self.table.push(opened)?.rep()))
    }

    fn find(&self, descriptor: &Resource<Descriptor>, path: &str) -> FsResult<(Arc<PinnedFolder>, NodeId, u64)> {
        let opened = self.opened(descriptor)?;
        let node = opened.folder.lookup(opened.node, path).map_err(|error| match error {
            LookupError::NotFound => ErrorCode::NoEntry,
            LookupError::NotAFolder => ErrorCode::NotDirectory,
            LookupError::Leaves => ErrorCode::NotPermitted,
        })?;
        Ok((Arc::clone(&opened.folder), node, opened.grant))
    }

    fn content(&self, descriptor: &Resource<Descriptor>) -> FsResult<Arc<Vec<u8>>> {
        let content = self.opened(descriptor)?.content.as_ref().ok_or(ErrorCode::IsDirectory)?;
        Ok(Arc::clone(content))
    }
}

impl preopens::Host for ToolData {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Resource<Descriptor>, String)>> {
        let capabilities = Arc::clone(&self.host.capabilities);
        let mut folders = vec![];
        for (grant, (name, folder)) in (0..).zip(capabilities.folders()) {
            let folder = Arc::clone(folder);
            let root = self.hand_out(Opened { folder, node: NodeId::ROOT, grant, content: None })?;
            folders.push((root, format!("/{name}")));
        }
        Ok(folders)
    }
}

impl types::Host for ToolData {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn filesystem_error_code(&mut self, error: Resource<wasmtime::Error>) -> wasmtime::Result<Option<ErrorCode>> {
        // Streams of files read from memory and do not fail; the error is another's.
        self.table.get(&error)?;
        Ok(None)
    }
}

impl types::HostDescriptor for ToolData {
    fn read_via_stream(&mut self, descriptor: Resource<Descriptor>, offset: u64) -> FsResult<Resource<DynInputStream>> {
        let content = Bytes::from_owner(Shared(self.content(&descriptor)?));
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let stream: DynInputStream = Box::new(MemoryInputPipe::new(content.slice(from..)));
        Ok(self.table.push(stream)?)
    }

    fn write_via_stream(&mut self, descriptor: Resource<Descriptor>, _: u64) -> FsResult<Resource<DynOutputStream>> {
        self.opened(&descriptor)?;
        read_only()
    }

    fn append_via_stream(&mut self, descriptor: Resource<Descriptor>) -> FsResult<Resource<DynOutputStream>> {
        self.opened(&descriptor)?;
        read_only()
    }

    async fn advise(&mut self, descriptor: Resource<Descriptor>, _: u64, _: u64, _: Advice) -> FsResult<()> {
        self.opened(&descriptor).map(|_| ())
    }

    async fn sync_data(&mut self, descriptor: Resource<Descriptor>) -> FsResult<()> {
        self.opened(&descriptor).map(|_| ())
    }

    async fn get_flags(&mut self, descriptor: Resource<Descriptor>) -> FsResult<DescriptorFlags> {
        self.opened(&descriptor)?;
        Ok(DescriptorFlags::READ)
    }

    async fn get_type(&mut self, descriptor: Resource<Descriptor>) -> FsResult<DescriptorType> {
        let opened = self.opened(&descriptor)?;
        Ok(kind(&opened.folder, opened.node))
    }

    async fn set_size(&mut self, _: Resource<Descriptor>, _: u64) -> FsResult<()> {
        read_only()
    }

    async fn set_times(&mut self, _: Resource<Descriptor>, _: NewTimestamp, _: NewTimestamp) -> FsResult<()> {
        read_only()
    }

    async fn read(&mut self, descriptor: Resource<Descriptor>, length: u64, offset: u64) -> FsResult<(Vec<u8>, bool)> {
        let content = self.content(&descriptor)?;
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let length = usize::try_from(length.min(READ_BYTES_MAX)).unwrap_or(usize::MAX);
        let rest = content.get(from..).unwrap_or_default();
        let bytes = rest.get(..length.min(rest.len())).unwrap_or_default().to_vec();
        let end = bytes.len() == rest.len();
        Ok((bytes, end))
    }

    async fn write(&mut self, _: Resource<Descriptor>, _: Vec<u8>, _: u64) -> FsResult<u64> {
        read_only()
    }

    async fn read_directory(&mut self, descriptor: Resource<Descriptor>) -> FsResult<Resource<DirectoryEntryStream>> {
        let opened = self.opened(&descriptor)?;
        let children = opened.folder.children(opened.node).ok_or(ErrorCode::NotDirectory)?;
        let entry = |(name, node): (&String, &NodeId)| DirectoryEntry {
            type_: kind(&opened.folder, *node),
            name: name.clone(),
        };
        let entries: Vec<DirectoryEntry> = children.iter().map(entry).collect();
        let listing = self.table.push(Listing { entries: entries.into_iter() })?;
        Ok(Resource::new_own(listing.rep()))
    }

    async fn sync(&mut self, descriptor: Resource<Descriptor>) -> FsResult<()> {
        self.opened(&descriptor).map(|_| ())
    }

    async fn create_directory_at(&mut self, _: Resource<Descriptor>, _: String) -> FsResult<()> {
        read_only()
    }

    async fn stat(&mut self, descriptor: Resource<Descriptor>) -> FsResult<DescriptorStat> {
        let opened = self.opened(&descriptor)?;
        Ok(stat(&opened.folder, opened.node))
    }

    async fn stat_at(
        &mut self,
        descriptor: Resource<Descriptor>,
        _: PathFlags,
        path: String,
    ) -> FsResult<DescriptorStat> {
        let (folder, node, _) = self.find(&descriptor, &path)?;
        Ok(stat(&folder, node))
    }

    async fn set_times_at(
        &mut self,
        _: Resource<Descriptor>,
        _: PathFlags,
        _: String,
        _: NewTimestamp,
        _: NewTimestamp,
    ) -> FsResult<()> {
        read_only()
    }

    async fn link_at(
        &mut self,
        _: Resource<Descriptor>,
        _: PathFlags,
        _: String,
        _: Resource<Descriptor>,
        _: String,
    ) -> FsResult<()> {
        read_only()
    }

    async fn open_at(
        &mut self,
        descriptor: Resource<Descriptor>,
        _: PathFlags,
        path: String,
        open: OpenFlags,
        flags: DescriptorFlags,
    ) -> FsResult<Resource<Descriptor>> {
        let changes = OpenFlags::CREATE | OpenFlags::EXCLUSIVE | OpenFlags::TRUNCATE;
        if open.intersects(changes) || flags.intersects(DescriptorFlags::WRITE | DescriptorFlags::MUTATE_DIRECTORY) {
            return read_only();
        }
        let (folder, node, grant) = self.find(&descriptor, &path)?;
        if folder.children(node).is_some() {
            return self.hand_out(Opened { folder, node, grant, content: None }).map_err(FsError::trap);
        }
        if open.contains(OpenFlags::DIRECTORY) {
            return Err(ErrorCode::NotDirectory.into());
        }
        let source = Arc::clone(&folder);
        let read = self.meter.host(tokio::task::spawn_blocking(move || source.read(node))).await;
        let content = match read {
            Ok(Ok(content)) => content,
            Ok(Err(error)) => return Err(FsError::trap(broken(&error).error())),
            Err(error) => return Err(FsError::trap(wasmtime::Error::new(error))),
        };
        self.hand_out(Opened { folder, node, grant, content: Some(content) }).map_err(FsError::trap)
    }

    async fn readlink_at(&mut self, descriptor: Resource<Descriptor>, path: String) -> FsResult<String> {
        // A link inside the folder is the file that it leads to.
        self.find(&descriptor, &path)?;
        Err(ErrorCode::Invalid.into())
    }

    async fn remove_directory_at(&mut self, _: Resource<Descriptor>, _: String) -> FsResult<()> {
        read_only()
    }

    async fn rename_at(
        &mut self,
        _: Resource<Descriptor>,
        _: String,
        _: Resource<Descriptor>,
        _: String,
    ) -> FsResult<()> {
        read_only()
    }

    async fn symlink_at(&mut self, _: Resource<Descriptor>, _: String, _: String) -> FsResult<()> {
        read_only()
    }

    async fn unlink_file_at(&mut self, _: Resource<Descriptor>, _: String) -> FsResult<()> {
        read_only()
    }

    async fn is_same_object(
        &mut self,
        one: Resource<Descriptor>,
        other: Resource<Descriptor>,
    ) -> wasmtime::Result<bool> {
        let entry = |descriptor: &Resource<Descriptor>| -> wasmtime::Result<(u64, NodeId)> {
            let opened = self.table.get(&Resource::<Opened>::new_borrow(descriptor.rep()))?;
            Ok((opened.grant, opened.node))
        };
        Ok(entry(&one)? == entry(&other)?)
    }

    async fn metadata_hash(&mut self, descriptor: Resource<Descriptor>) -> FsResult<MetadataHashValue> {
        let opened = self.opened(&descriptor)?;
        Ok(MetadataHashValue { lower: opened.node.number(), upper: opened.grant })
    }

    async fn metadata_hash_at(
        &mut self,
        descriptor: Resource<Descriptor>,
        _: PathFlags,
        path: String,
    ) -> FsResult<MetadataHashValue> {
        let (_, node, grant) = self.find(&descriptor, &path)?;
        Ok(MetadataHashValue { lower: node.number(), upper: grant })
    }

    fn drop(&mut self, descriptor: Resource<Descriptor>) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Opened>::new_own(descriptor.rep()))?;
        Ok(())
    }
}

impl types::HostDirectoryEntryStream for ToolData {
    async fn read_directory_entry(
        &mut self,
        stream: Resource<DirectoryEntryStream>,
    ) -> FsResult<Option<DirectoryEntry>> {
        Ok(self.table.get_mut(&Resource::<Listing>::new_borrow(stream.rep()))?.entries.next())
    }

    fn drop(&mut self, stream: Resource<DirectoryEntryStream>) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Listing>::new_own(stream.rep()))?;
        Ok(())
    }
}

/// A pinned file that is not what it was ends the attempt: what the tool would do with it could not be repeated.
fn broken(error: &FolderError) -> Stop {
    Stop(AttemptOutcome::failed(OutcomeKind::HostFault, format!("a granted folder: {error}")))
}
