//! A way to a server on loopback that can be closed.

use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// For how long a store is out of reach: `OUTAGE` seconds, 4 unless given.
pub(crate) fn outage() -> Duration {
    let seconds = std::env::var("OUTAGE").map_or(4, |text| text.parse().unwrap());
    Duration::from_secs(seconds)
}

/// A way to a server that can be closed.
pub(crate) struct Gate {
    port: u16,
    open: watch::Sender<bool>,
}

impl Gate {
    /// A gate to the server at this port.
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap().port();
        let (open, opened) = watch::channel(true);
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut opened = opened.clone();
                tokio::spawn(async move {
                    if !*opened.borrow() {
                        return; // dropped at once
                    }
                    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = opened.wait_for(|open| !open) => {} // cut off in the middle
                    }
                });
            }
        });
        Self { port: here, open }
    }

    /// A gate to a database on loopback, and the URL that leads through it.
    pub(crate) async fn to_database(url: &str) -> (Self, String) {
        let (user, place) = url.split_once('@').unwrap();
        let (address, name) = place.split_once('/').unwrap();
        let gate = Self::to(address.split_once(':').unwrap().1.parse().unwrap()).await;
        let url = format!("{user}@127.0.0.1:{}/{name}", gate.port);
        (gate, url)
    }

    /// Lets everybody through, or cuts everybody off.
    pub(crate) fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}
