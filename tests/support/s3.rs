//! An S3-compatible server on loopback, in this process, with one bucket in a temporary folder.

#![allow(dead_code, reason = "each test that names the module uses a part of it")]

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tempfile::TempDir;
use tokio::net::TcpListener;

/// The server; its clients find it gone once it is dropped with its runtime.
pub(crate) struct S3 {
    root: TempDir,
    port: u16,
    accepts: Arc<AtomicBool>,
}

impl S3 {
    pub(crate) async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("bucket")).unwrap();
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).unwrap());
        service.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = service.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepts = Arc::new(AtomicBool::new(true));
        let open = Arc::clone(&accepts);
        tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                if !open.load(Ordering::Acquire) {
                    continue; // dropped at once
                }
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    // A client that goes away is no failure of the server.
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { root, port, accepts }
    }

    /// The store's URL.
    pub(crate) fn url(&self) -> String {
        "s3://bucket/some/prefix".to_owned()
    }

    /// The settings that lead here instead of to Amazon.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        vec![
            pair("AWS_ENDPOINT", &format!("http://127.0.0.1:{}", self.port)),
            pair("AWS_ALLOW_HTTP", "true"),
            pair("AWS_REGION", "us-east-1"),
            pair("AWS_ACCESS_KEY_ID", "key"),
            pair("AWS_SECRET_ACCESS_KEY", "secret"),
        ]
    }

    /// Where the objects' bytes lie.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.path().join("bucket/some/prefix/sha256")
    }

    /// Takes new connections, or drops them.
    pub(crate) fn accept(&self, accepts: bool) {
        self.accepts.store(accepts, Ordering::Release);
    }
}
