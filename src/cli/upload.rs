//! Bringing a checkpoint or a data set to a server, in chunks, from where a broken stream ended.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt as _, once};
use tonic::Code;

use crate::cli::client::{ServerArgs, is_broken};
use crate::cli::failure::Failure;
use crate::cli::progress::{Display, Step};
use crate::data::{Dataset, Source, is_tar};
use crate::digest::hex;
use crate::error::{Error, Result};
use crate::grpc::proto::upload_request::Part;
use crate::grpc::proto::upload_service_client::UploadServiceClient;
use crate::grpc::proto::{GetUploadRequest, Upload, UploadHeader, UploadKind, UploadRequest};

/// Size of a message.
const CHUNK: usize = 1 << 20;
/// Messages that are read ahead of the network.
const AHEAD: usize = 4;
/// Broken streams in a row without a byte of progress after which the command gives up.
const ATTEMPTS: u32 = 5;
/// Pause before a broken stream is continued.
const PAUSE: Duration = Duration::from_secs(1);

/// Where to, and under which name.
#[derive(Debug, clap::Args)]
pub(super) struct Destination {
    /// Name on the server: one to three words of letters, digits, `.`, `_`, `-`, joined by `/`;
    /// without one, the last part of PATH.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// What is brought.
#[derive(Clone, Debug)]
pub(super) struct Load {
    kind: UploadKind,
    /// Name, if the user gives none.
    name: String,
    config: String,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// One file as it is.
    File(PathBuf),
    /// Files that are put into a tar file on the way: name, and where the file lies; folders end in
    /// a slash.
    Tar(Vec<(String, PathBuf)>),
}

impl Load {
    /// A folder with `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// `Io` for a file that is missing.
    pub(super) fn checkpoint(folder: &Path) -> Result<Self> {
        let read =
            |path: PathBuf| std::fs::read_to_string(&path).map_err(|error| Error::io(path, error));
        Ok(Self {
            kind: UploadKind::Checkpoint,
            name: last_part(folder),
            config: read(folder.join("config.json"))?,
            content: Content::File(folder.join("model.safetensors")),
        })
    }

    /// A folder of class folders, or a tar file of them.
    ///
    /// # Errors
    /// As [`Dataset::open`], on the path.
    pub(super) fn dataset(path: &Path) -> Result<Self> {
        let dataset = Dataset::open(path, &path.display().to_string())?;
        let content = if is_tar(path) && path.is_file() {
            Content::File(path.to_owned())
        } else {
            let classes = path.join("classes.txt");
            let list = classes.is_file().then(|| ("classes.txt".to_owned(), classes));
            let folders = dataset.classes.iter().filter(|class| path.join(class).is_dir());
            let folders = folders.map(|class| (format!("{class}/"), path.join(class)));
            let images = dataset.samples.iter().filter_map(|sample| match &sample.source {
                Source::File(path) => Some((sample.name.clone(), path.clone())),
                Source::Member(_) => None,
            });
            Content::Tar(list.into_iter().chain(folders).chain(images).collect())
        };
        let name = last_part(&path.with_extension(""));
        Ok(Self { kind: UploadKind::Dataset, name, config: String::new(), content })
    }
}

fn last_part(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Brings it, and returns once the server has checked it.
///
/// # Errors
/// What the server refuses; `Unfinished` when the connection keeps breaking.
pub(super) async fn upload(load: Load, destination: Destination) -> Result<Upload, Failure> {
    let Destination { name, server } = destination;
    let name = name.unwrap_or(load.name);
    let display = Arc::new(Display::new());
    display.step(&Step { stage: "hash".to_owned(), ..Step::default() });
    let content = load.content.clone();
    let (bytes, sha256) = blocking(move || fingerprint(&content)).await?;
    let mut header = UploadHeader {
        kind: load.kind.into(),
        name: name.clone(),
        config: load.config,
        bytes,
        sha256,
        images: 0,
        offset: 0,
    };
    let mut failures = 0;
    loop {
        match attempt(&server, &mut header, &load.content, &display).await {
            Ok(upload) if upload.complete => return Ok(upload),
            Ok(upload) => {
                let reason = format!("the server has {} of {bytes} bytes", upload.received_bytes);
                return Err(Failure::Unfinished(reason));
            }
            Err((failure, progressed)) => {
                failures = if progressed { 1 } else { failures + 1 };
                if !is_temporary(&failure) || failures == ATTEMPTS {
                    return Err(failure);
                }
                display.step(&Step {
                    stage: "retry".to_owned(),
                    note: "the connection broke".to_owned(),
                    ..Step::default()
                });
                tokio::time::sleep(PAUSE * failures).await;
            }
        }
    }
}

/// One stream, from where the server says; with a failure, whether more had come than before.
async fn attempt(
    server: &ServerArgs,
    header: &mut UploadHeader,
    content: &Content,
    display: &Arc<Display>,
) -> Result<Upload, (Failure, bool)> {
    let unmoved = |failure: Failure| (failure, false);
    let mut client = UploadServiceClient::new(server.connect().await.map_err(unmoved)?);
    let request = GetUploadRequest { kind: header.kind, name: header.name.clone() };
    let before = header.offset;
    match client.get_upload(request).await {
        Ok(answer) => {
            let found = answer.into_inner().upload.unwrap_or_default();
            if found.sha256 == header.sha256 {
                if found.complete {
                    return Ok(found);
                }
                header.offset = found.received_bytes;
            }
        }
        Err(status) if status.code() == Code::NotFound => header.offset = 0,
        Err(status) => return Err(unmoved(status.into())),
    }
    let progressed = header.offset > before;
    let (sender, receiver) = mpsc::channel(AHEAD);
    let (content, offset, bytes) = (content.clone(), header.offset, header.bytes);
    let reader = tokio::task::spawn_blocking(move || send(&content, offset, sender));
    let chunks = ReceiverStream::new(receiver).map(|chunk: Bytes| Part::Chunk(chunk));
    let mut sent = offset;
    let display = Arc::clone(display);
    let parts = once(Part::Header(header.clone())).chain(chunks).map(move |part| {
        if let Part::Chunk(chunk) = &part {
            sent += chunk.len() as u64;
            display.step(&Step {
                stage: "upload".to_owned(),
                unit: sent,
                units: bytes,
                note: "bytes".to_owned(),
            });
        }
        UploadRequest { part: Some(part) }
    });
    let answer = client.upload(parts).await;
    let read = reader.await.map_err(|error| unmoved(Error::internal(error.to_string()).into()))?;
    match answer {
        // The server's word is the cause; that the reader could not go on is its effect.
        Err(status) => Err((status.into(), progressed)),
        Ok(answer) => {
            read.map_err(|error| unmoved(error.into()))?;
            Ok(answer.into_inner().upload.unwrap_or_default())
        }
    }
}

fn is_temporary(failure: &Failure) -> bool {
    match failure {
        Failure::Unreachable { .. } => true,
        Failure::Refused(status) => is_broken(status),
        Failure::Local(_) | Failure::Usage(_) | Failure::Unusable(_) | Failure::Unfinished(_) => {
            false
        }
    }
}

/// Size and sha256 of the content.
fn fingerprint(content: &Content) -> Result<(u64, String)> {
    struct Sum(Sha256, u64);
    impl Write for Sum {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            self.1 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut sum = BufWriter::with_capacity(CHUNK, Sum(Sha256::new(), 0));
    write(content, 0, &mut sum)?;
    let Sum(hash, bytes) =
        sum.into_inner().map_err(|error| Error::io("hash", error.into_error()))?;
    Ok((bytes, hex(&hash.finalize())))
}

/// Sends the content behind `offset` in chunks, until nobody wants them any more.
fn send(content: &Content, offset: u64, sender: mpsc::Sender<Bytes>) -> Result<()> {
    struct Chunks(mpsc::Sender<Bytes>);
    impl Write for Chunks {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let chunk = Bytes::copy_from_slice(bytes);
            self.0.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut chunks = BufWriter::with_capacity(CHUNK, Chunks(sender));
    write(content, offset, &mut chunks)?;
    chunks.flush().map_err(|error| Error::io("connection", error))
}

/// Writes the content without its first `offset` bytes. The same files give the same bytes.
fn write(content: &Content, offset: u64, out: &mut dyn Write) -> Result<()> {
    match content {
        Content::File(path) => {
            let mut copy = || {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(offset))?;
                io::copy(&mut file, out)
            };
            copy().map(drop).map_err(|error| Error::io(path, error))
        }
        Content::Tar(members) => {
            let mut builder = Builder::new(Skip { left: offset, out });
            for (name, path) in members {
                append(&mut builder, name, path).map_err(|error| Error::io(path, error))?;
            }
            builder.finish().map_err(|error| Error::io("tar", error))
        }
    }
}

/// Without the file's owner and times, which are nobody's business.
fn append(builder: &mut Builder<impl Write>, name: &str, path: &Path) -> io::Result<()> {
    let mut header = Header::new_gnu();
    if name.ends_with('/') {
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        return builder.append_data(&mut header, name, io::empty());
    }
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    header.set_mode(0o644);
    header.set_size(size);
    // A file that grows meanwhile must not shift what follows.
    builder.append_data(&mut header, name, file.take(size))
}

/// Drops the first bytes.
struct Skip<'a> {
    left: u64,
    out: &'a mut dyn Write,
}

impl Write for Skip<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        self.left -= skipped as u64;
        self.out.write_all(&bytes[skipped..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Error::internal(error.to_string()))??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(content: &Content, offset: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(content, offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_folder_is_the_same_tar_file_every_time_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [("b/1.png", "one"), ("a/2.png", "two"), ("a/x.txt", "other")] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        let load = Load::dataset(folder.path()).unwrap();
        let whole = bytes_of(&load.content, 0);
        assert_eq!(whole, bytes_of(&load.content, 0));
        let (bytes, sha256) = fingerprint(&load.content).unwrap();
        assert_eq!((bytes, sha256), (whole.len() as u64, crate::digest::sha256_hex(&whole)));
        for offset in [1, 511, 512, 700, bytes - 1, bytes] {
            assert_eq!(bytes_of(&load.content, offset), whole[offset as usize..], "{offset}");
        }

        let tar = folder.path().join("set.tar");
        std::fs::write(&tar, &whole).unwrap();
        let (of_tar, of_folder) =
            (Dataset::open(&tar, "x").unwrap(), Dataset::open(folder.path(), "x").unwrap());
        assert_eq!(of_tar.classes, of_folder.classes);
        let contents = |set: &Dataset| -> Vec<(String, Vec<u8>)> {
            set.samples.iter().map(|s| (s.name.clone(), s.read(99).unwrap())).collect()
        };
        assert_eq!(contents(&of_tar), contents(&of_folder));
        let load = Load::dataset(&tar).unwrap();
        assert_eq!(load.name, "set");
        assert_eq!(bytes_of(&load.content, 600), whole[600..]);
    }

    #[tokio::test]
    async fn chunks_end_when_nobody_listens() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 3 * CHUNK + 5]).unwrap();
        let content = Content::File(file.path().to_owned());
        let (sender, mut receiver) = mpsc::channel(1);
        let all = content.clone();
        let task = tokio::task::spawn_blocking(move || send(&all, 10, sender));
        let mut bytes = 0;
        while let Some(chunk) = receiver.recv().await {
            bytes += chunk.len();
        }
        task.await.unwrap().unwrap();
        assert_eq!(bytes, 3 * CHUNK - 5);

        let (sender, receiver) = mpsc::channel(1);
        drop(receiver);
        let task = tokio::task::spawn_blocking(move || send(&content, 0, sender));
        assert!(task.await.unwrap().is_err());
    }
}
