//! The registry with artifacts of one word, and models that do what their word says.

use std::time::Duration;

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::*;
use crate::artifact::store::{LocalArtifactStore, example_record};
use crate::data::Pixels;
use crate::database::Database;
use crate::engine::device::{Batching, Network};

/// Size of every model here, in bytes.
const SIZE: u64 = 100;

struct Constant;

impl Network for Constant {
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
        Ok(vec![1.0; images.count])
    }

    fn resident_bytes(&self) -> u64 {
        SIZE
    }
}

fn read_word(_digest: &str, bytes: &[u8], _backend: Backend) -> Result<BuildNetwork> {
    match bytes {
        b"unreadable" => Err(Error::corrupt("artifact", "unreadable")),
        b"too large" => Ok(Box::new(|_| Err(Error::internal("out of memory")))),
        _ => Ok(Box::new(|_| Ok(Box::new(Constant)))),
    }
}

/// A registry with one model per word; ids are the words with hyphens.
async fn registry(data: &TempDir, words: &[&'static str]) -> Arc<ModelRegistry> {
    registry_with(data, words, None).await
}

async fn registry_with(
    data: &TempDir,
    words: &[&'static str],
    memory_budget: Option<u64>,
) -> Arc<ModelRegistry> {
    let store = LocalArtifactStore::open(data.path()).unwrap();
    let catalog = catalog(data).await;
    for word in words {
        let digest = store.put(Bytes::from_static(word.as_bytes())).await.unwrap();
        catalog.create(&example_record(&word.replace(' ', "-"), &digest)).await.unwrap();
    }
    with_budget(Arc::new(store), data, memory_budget).await
}

async fn catalog(data: &TempDir) -> ModelCatalog {
    ModelCatalog::new(database(data).await)
}

async fn database(data: &TempDir) -> Database {
    Database::file(&data.path().join("db")).await.unwrap()
}

async fn open(store: Arc<dyn ArtifactStore>, data: &TempDir) -> Arc<ModelRegistry> {
    with_budget(store, data, None).await
}

async fn with_budget(
    store: Arc<dyn ArtifactStore>,
    data: &TempDir,
    memory_budget: Option<u64>,
) -> Arc<ModelRegistry> {
    let batching = Batching { max_batch: 4, delay: Duration::ZERO };
    let devices = vec![DeviceHandle::start(tch::Device::Cpu, batching, Arc::default()).unwrap()];
    let garbage = Garbage::new(database(data).await, Arc::clone(&store));
    let (catalog, backend) = (catalog(data).await, Backend::Simulated);
    let parts = RegistryParts { store, catalog, garbage, devices, backend, memory_budget };
    ModelRegistry::with_reader(parts, read_word).await.unwrap()
}

fn id(text: &str) -> ModelId {
    ModelId::parse(text, "model").unwrap()
}

#[tokio::test]
async fn callers_share_one_load() {
    let data = tempfile::tempdir().unwrap();
    let registry = registry(&data, &["good"]).await;
    let mut calls = JoinSet::new();
    for _ in 0..8 {
        let registry = Arc::clone(&registry);
        calls.spawn(async move { registry.ensure_loaded(&id("good")).await.unwrap().1.key });
    }
    let keys: Vec<LoadKey> = calls.join_all().await;
    assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), SIZE);
    registry.unload(&id("good")).await.unwrap();
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), 0);
    assert_ne!(registry.ensure_loaded(&id("good")).await.unwrap().1.key, keys[0]);
}

#[tokio::test]
async fn a_failed_load_is_told_kept_and_tried_again() {
    let data = tempfile::tempdir().unwrap();
    let registry = registry(&data, &["unreadable", "too large", "rotten"]).await;
    let digest = registry.get(&id("rotten")).unwrap().record.digest.clone();
    let file = data.path().join("objects/sha256").join(format!("{digest}.safetensors"));
    std::fs::write(&file, b"other").unwrap();
    for name in ["unreadable", "too-large", "rotten"] {
        assert!(registry.ensure_loaded(&id(name)).await.is_err());
        assert!(matches!(registry.get(&id(name)).unwrap().state, ModelState::Failed(_)), "{name}");
    }
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), 0);
    std::fs::write(&file, b"rotten").unwrap();
    registry.ensure_loaded(&id("rotten")).await.unwrap();
    assert!(matches!(registry.get(&id("rotten")).unwrap().state, ModelState::Ready(_)));
}

/// A store whose reads wait until they are let through.
#[derive(Debug)]
struct Gated {
    inner: LocalArtifactStore,
    gate: Semaphore,
}

#[async_trait]
impl ArtifactStore for Gated {
    async fn put(&self, bytes: Bytes) -> Result<String> {
        self.inner.put(bytes).await
    }

    async fn get(&self, digest: &str) -> Result<Bytes> {
        self.gate.acquire().await.unwrap().forget();
        self.inner.get(digest).await
    }

    async fn contains(&self, digest: &str) -> Result<bool> {
        self.inner.contains(digest).await
    }

    async fn older_than(&self, age: Duration) -> Result<Vec<String>> {
        self.inner.older_than(age).await
    }

    async fn owner(&self) -> Result<Option<String>> {
        self.inner.owner().await
    }

    async fn give_to(&self, installation: &str) -> Result<()> {
        self.inner.give_to(installation).await
    }

    async fn delete(&self, digest: &str) -> Result<()> {
        self.inner.delete(digest).await
    }
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_stop_the_load_and_unload_waits_for_it() {
    let data = tempfile::tempdir().unwrap();
    let inner = LocalArtifactStore::open(data.path()).unwrap();
    let catalog = catalog(&data).await;
    let digest = inner.put("good".into()).await.unwrap();
    catalog.create(&example_record("good", &digest)).await.unwrap();
    let store = Arc::new(Gated { inner, gate: Semaphore::new(0) });
    let registry = open(Arc::clone(&store) as Arc<dyn ArtifactStore>, &data).await;

    let name = id("good");
    tokio::select! {
        biased;
        _ = registry.ensure_loaded(&name) => panic!("the store is closed"),
        () = tokio::task::yield_now() => {} // the caller leaves
    }
    assert!(matches!(registry.get(&name).unwrap().state, ModelState::Loading));
    let delete = registry.delete(&name);
    tokio::pin!(delete);
    tokio::select! {
        biased;
        _ = &mut delete => panic!("the load is not over"),
        () = tokio::task::yield_now() => {}
    }
    store.gate.add_permits(1);
    delete.await.unwrap();
    assert!(matches!(registry.get(&name).unwrap_err(), Error::NotFound { .. }));
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), 0);
    assert!(matches!(store.inner.get(&digest).await.unwrap_err(), Error::NotFound { .. }));
}

fn loaded(registry: &ModelRegistry) -> Vec<String> {
    let views = registry.list(None, 100).into_iter();
    let ready = views.filter(|view| matches!(view.state, ModelState::Ready(_)));
    ready.map(|view| view.record.id.clone()).collect()
}

#[tokio::test]
async fn the_least_recently_used_models_make_room() {
    let data = tempfile::tempdir().unwrap();
    let registry = registry_with(&data, &["a1", "b1", "c1"], Some(2 * SIZE)).await;
    for name in ["a1", "b1", "a1", "c1"] {
        registry.ensure_loaded(&id(name)).await.unwrap();
    }
    assert_eq!(loaded(&registry), ["a1", "c1"]);
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), 2 * SIZE);
    // Models in use stay, and what does not fit then says so; it fits as soon as they are not.
    let users = [
        registry.ensure_loaded(&id("a1")).await.unwrap(),
        registry.ensure_loaded(&id("c1")).await.unwrap(),
    ];
    let error = registry.ensure_loaded(&id("b1")).await.unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
    assert_eq!(loaded(&registry), ["a1", "c1"]);
    drop(users);
    registry.ensure_loaded(&id("b1")).await.unwrap();
    assert_eq!(loaded(&registry), ["b1", "c1"]);
}

#[tokio::test]
async fn a_model_larger_than_the_budget_is_refused_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let registry = registry_with(&data, &["a1"], Some(SIZE - 1)).await;
    let error = registry.ensure_loaded(&id("a1")).await.unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
    assert_eq!(registry.emptiest_device().unwrap().resident_bytes(), 0);
}

#[tokio::test]
async fn traffic_of_an_alias_moves_when_its_new_model_can_take_it() {
    let data = tempfile::tempdir().unwrap();
    let inner = LocalArtifactStore::open(data.path()).unwrap();
    let names = catalog(&data).await;
    for word in ["old", "new"] {
        let digest = inner.put(Bytes::from_static(word.as_bytes())).await.unwrap();
        names.create(&example_record(word, &digest)).await.unwrap();
    }
    let store = Arc::new(Gated { inner, gate: Semaphore::new(1) });
    let registry = open(Arc::clone(&store) as Arc<dyn ArtifactStore>, &data).await;
    registry.set_alias(&id("live"), &id("old")).await.unwrap();
    registry.ensure_loaded(&id("live")).await.unwrap();

    // Here: the alias waits for the model.
    let (alias, new) = (id("live"), id("new"));
    let moving = registry.set_alias(&alias, &new);
    tokio::pin!(moving);
    tokio::select! {
        biased;
        _ = &mut moving => panic!("the new model is not there"),
        () = tokio::task::yield_now() => {}
    }
    assert_eq!(registry.ensure_loaded(&alias).await.unwrap().0.id, "old");
    store.gate.add_permits(1);
    moving.await.unwrap();
    assert_eq!(registry.ensure_loaded(&alias).await.unwrap().0.id, "new");

    // Elsewhere: who learns of it goes on with the old one until the new one is there.
    registry.unload(&id("old")).await.unwrap();
    names.set_alias(&alias, &id("old")).await.unwrap();
    registry.refresh().await.unwrap();
    assert_eq!(registry.ensure_loaded(&alias).await.unwrap().0.id, "new");
    assert_eq!(registry.get(&alias).unwrap().record.id, "old", "the name is of the new model");
    store.gate.add_permits(1);
    registry.ensure_loaded(&id("old")).await.unwrap();
    assert_eq!(registry.ensure_loaded(&alias).await.unwrap().0.id, "old");
}
