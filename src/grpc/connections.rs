//! Connections on their way in: how many there may be, and how long each may take to say what it
//! wants.
//!
//! Neither tonic nor hyper bounds the number of connections, the time of a TLS handshake, or the
//! time until a client has sent the first bytes of HTTP/2. Here a connection gets a place before
//! anything is read from it, and reaches the services once it has shown that it speaks HTTP/2. What
//! it does later is bounded by keep-alive pings and by its age.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::reload::Reloadable;
use super::tls;

/// What a client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Connections that are ready and not yet taken over.
const READY: usize = 16;
/// Pause after the system had no socket to give.
const PAUSE: Duration = Duration::from_millis(100);

/// Bounds of connections.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Connections at once, those included that are being opened; more are closed.
    pub connections: usize,
    /// Time for a connection's TLS handshake and the first bytes of HTTP/2 together.
    pub opening: Duration,
    /// Age at which a connection is asked to end; without one, none is.
    pub age: Option<Duration>,
    /// Time for what then runs on it, before it is cut off.
    pub grace: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            opening: Duration::from_secs(10),
            age: None,
            grace: Duration::from_secs(30),
        }
    }
}

/// Who is at the other end of a connection; an extension of each of its requests.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Its address.
    pub(super) address: SocketAddr,
    /// The names in its verified certificate; `None` where none was asked for.
    pub(super) certificate: Option<Arc<[String]>>,
}

/// A connection that speaks HTTP/2.
#[derive(Debug)]
pub(super) struct Connection {
    io: Io,
    peer: Peer,
    /// Bytes of the preface, read already, that HTTP/2 has been given.
    replayed: usize,
    /// When it is cut off. tonic asks connections to end or cuts them off, never one after the other.
    end: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The connections of a listener; ends it when dropped.
pub(super) fn incoming(
    listener: TcpListener,
    limits: ConnectionLimits,
    tls: Option<Arc<Reloadable<ServerConfig>>>,
) -> ReceiverStream<Result<Connection, Infallible>> {
    let (ready, connections) = mpsc::channel(READY);
    tokio::spawn(accept(listener, limits, tls, ready));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    limits: ConnectionLimits,
    tls: Option<Arc<Reloadable<ServerConfig>>>,
    ready: mpsc::Sender<Result<Connection, Infallible>>,
) {
    let places = Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
    let mut opening = JoinSet::new();
    let mut is_full = false;
    loop {
        let (stream, address) = tokio::select! {
            () = ready.closed() => return,
            Some(_) = opening.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            if !is_full {
                tracing::warn!(limit = limits.connections, "more connections are closed");
            }
            is_full = true;
            continue;
        };
        is_full = false;
        let (tls, ready) = (tls.as_ref().map(|tls| tls.get()), ready.clone());
        opening.spawn(async move {
            match tokio::time::timeout(limits.opening, open(stream, address, tls)).await {
                Ok(Ok((io, peer))) => {
                    let end =
                        limits.age.map(|age| Box::pin(sleep(age.saturating_add(limits.grace))));
                    let connection = Connection { io, peer, replayed: 0, end, _place: place };
                    let _ = ready.send(Ok(connection)).await; // the server may be gone
                }
                Ok(Err(error)) => tracing::debug!(%address, %error, "a connection failed to open"),
                Err(_) => tracing::debug!(%address, "a connection took too long to open"),
            }
        });
    }
}

/// The TLS handshake, if there is one, and the preface of HTTP/2.
async fn open(
    stream: TcpStream,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
) -> io::Result<(Io, Peer)> {
    stream.set_nodelay(true)?;
    let (mut io, certificate) = match tls {
        None => (Io::Plain(stream), None),
        Some(config) => {
            let stream = TlsAcceptor::from(config).accept(stream).await?;
            let owner = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let names = owner.map(|certificate| tls::names(certificate).into());
            (Io::Tls(Box::new(stream)), names)
        }
    };
    let mut preface = [0; PREFACE.len()];
    io.read_exact(&mut preface).await?;
    if preface != *PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client does not speak HTTP/2"));
    }
    Ok((io, Peer { address, certificate }))
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let rest = &PREFACE[self.replayed..];
        if rest.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        self.replayed += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// The same call on whichever stream it is.
macro_rules! on_stream {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io {
            Io::Plain($stream) => $call,
            Io::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_stream!(self.get_mut(), stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_stream!(self.get_mut(), stream => Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self.get_mut(), stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self.get_mut(), stream => Pin::new(stream).poll_shutdown(context))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_stream!(self.get_mut(), stream => Pin::new(stream).poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        on_stream!(self, stream => stream.is_write_vectored())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio_stream::StreamExt as _;

    use super::*;

    async fn listen(
        limits: ConnectionLimits,
    ) -> (SocketAddr, ReceiverStream<Result<Connection, Infallible>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (address, incoming(listener, limits, None))
    }

    /// Whether the other end has closed the connection.
    async fn is_closed(stream: &mut TcpStream) -> bool {
        matches!(stream.read(&mut [0; 8]).await, Ok(0) | Err(_))
    }

    #[tokio::test]
    async fn http2_is_handed_over_whole_and_anything_else_is_closed() {
        let (address, mut connections) = listen(ConnectionLimits::default()).await;
        let mut other = TcpStream::connect(address).await.unwrap();
        other.write_all(b"GET / HTTP/1.1\r\nhost: example.org\r\n\r\n").await.unwrap();
        assert!(is_closed(&mut other).await);
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        client.write_all(b"more").await.unwrap();
        let mut connection = connections.next().await.unwrap().unwrap();
        let mut read = [0; PREFACE.len() + 4];
        connection.read_exact(&mut read).await.unwrap();
        assert_eq!(read[..], [&PREFACE[..], b"more"].concat()[..]);
        assert_eq!(connection.connect_info().address, client.local_addr().unwrap());
        connection.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
    }

    #[tokio::test]
    async fn a_silent_client_gives_its_place_back() {
        let opening = Duration::from_millis(50);
        let limits = ConnectionLimits { connections: 1, opening, ..Default::default() };
        let (address, mut connections) = listen(limits).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(&PREFACE[..10]).await.unwrap();
        let mut refused = TcpStream::connect(address).await.unwrap();
        assert!(is_closed(&mut refused).await, "the only place is taken");
        assert!(is_closed(&mut silent).await, "half a preface is not waited for");
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        let connection = connections.next().await.unwrap().unwrap();
        let mut refused = TcpStream::connect(address).await.unwrap();
        assert!(is_closed(&mut refused).await, "an open connection keeps its place");
        drop(connection);
        assert!(is_closed(&mut client).await);
    }

    #[tokio::test]
    async fn the_listener_ends_with_its_connections() {
        let (address, connections) = listen(ConnectionLimits::default()).await;
        let mut opening = TcpStream::connect(address).await.unwrap();
        drop(connections);
        assert!(is_closed(&mut opening).await);
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
