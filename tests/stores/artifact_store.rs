//! The artifact stores: the same tests on a folder and on an S3-compatible server.

use std::fs;
use std::path::Path;
use std::time::Duration;

use vitq::Error;
use vitq::artifact::store::{ArtifactStore, LocalArtifactStore, RemoteArtifactStore};

use crate::s3::S3;

/// FIPS 180-2, appendix B.1.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

/// `objects` is where the store keeps its bytes.
async fn keeps_its_promises(store: &dyn ArtifactStore, objects: &Path) {
    assert!(!store.contains(ABC).await.unwrap());
    assert!(matches!(store.get(ABC).await.unwrap_err(), Error::NotFound { .. }));
    for _ in 0..2 {
        assert_eq!(store.put("abc".into()).await.unwrap(), ABC);
        assert_eq!(store.get(ABC).await.unwrap(), "abc");
    }
    assert!(store.contains(ABC).await.unwrap());
    assert_eq!(store.older_than(Duration::ZERO).await.unwrap(), [ABC]);
    assert!(store.older_than(Duration::from_secs(3600)).await.unwrap().is_empty());

    // A flipped bit is found, and healed by the next put.
    let file = objects.join(format!("{ABC}.safetensors"));
    fs::write(&file, b"abb").unwrap();
    assert!(matches!(store.get(ABC).await.unwrap_err(), Error::CorruptArtifact { .. }));
    store.put("abc".into()).await.unwrap();
    assert_eq!(store.get(ABC).await.unwrap(), "abc");

    // Names that are no digests reach nothing.
    for name in ["", "../../secret", &"A".repeat(64), &"a/".repeat(32)] {
        assert!(matches!(store.get(name).await.unwrap_err(), Error::NotFound { .. }), "{name}");
        assert!(matches!(store.delete(name).await.unwrap_err(), Error::NotFound { .. }));
    }
    store.delete(ABC).await.unwrap();
    store.delete(ABC).await.unwrap();
    assert!(!store.contains(ABC).await.unwrap());
    assert!(store.older_than(Duration::ZERO).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_keeps_artifacts() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalArtifactStore::open(folder.path()).unwrap();
    keeps_its_promises(&store, &folder.path().join("objects/sha256")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_keeps_artifacts() {
    let server = S3::start().await;
    let store = RemoteArtifactStore::with_settings(&server.url(), server.settings()).unwrap();
    keeps_its_promises(&store, &server.objects()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_out_of_reach_is_unavailable_and_comes_back() {
    let server = S3::start().await;
    let store = RemoteArtifactStore::with_settings(&server.url(), server.settings()).unwrap();
    server.accept(false);
    let error = store.put("abc".into()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { what: "artifact store", .. }), "{error}");
    server.accept(true);
    assert_eq!(store.put("abc".into()).await.unwrap(), ABC);
    // The wrong key is no outage, but nothing is lost by it, either.
    let mut settings = server.settings();
    settings.last_mut().unwrap().1 = "wrong".to_owned();
    let store = RemoteArtifactStore::with_settings(&server.url(), settings).unwrap();
    assert!(store.get(ABC).await.is_err());
}
