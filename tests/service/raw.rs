//! HTTP/2 without manners: what no gRPC client would send.

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::{Builder, SendRequest};
use h2::{Reason, SendStream};
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::TcpStream;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vitq::grpc::proto::{ClassifyRequest, Image};

pub(crate) const CLASSIFY: &str = "/vitq.v1.InferenceService/Classify";

/// A connection; its clones share it.
#[derive(Clone)]
pub(crate) struct Raw {
    send: SendRequest<Bytes>,
    address: String,
}

impl Raw {
    pub(crate) async fn connect(address: &str) -> Self {
        Self::with(address, &Builder::new()).await
    }

    pub(crate) async fn with(address: &str, settings: &Builder) -> Self {
        let socket = TcpStream::connect(host(address)).await.unwrap();
        let (send, connection) = settings.handshake(socket).await.unwrap();
        tokio::spawn(async move {
            let _ = connection.await; // the server may well end it
        });
        Self { send, address: address.to_owned() }
    }

    /// Begins a call; its answer, and the way to send its body.
    pub(crate) async fn begin(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<(h2::client::ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut request = Request::post(format!("{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut send = self.send.clone().ready().await?;
        send.send_request(request.body(()).unwrap(), false)
    }

    /// A whole call.
    pub(crate) async fn call(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Answer, h2::Error> {
        let (http, end) = self.exchange(path, headers, body).await?;
        let status = Status::from_header_map(&end);
        let has_reason = status.is_some_and(|status| status.get_details_error_info().is_some());
        Ok(Answer { http, code: code(&end), has_reason })
    }

    /// The status of a whole call, as the server gives it: tonic's client ends late calls by itself.
    pub(crate) async fn status(&self, path: &str, headers: &[(&str, &str)], body: Bytes) -> Status {
        let (_, end) = self.exchange(path, headers, body).await.unwrap();
        Status::from_header_map(&end).unwrap()
    }

    /// A whole call: the HTTP status, and the headers that the gRPC status is in.
    async fn exchange(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<(u16, HeaderMap), h2::Error> {
        let (answer, mut stream) = self.begin(path, headers).await?;
        stream.send_data(body, true)?;
        let (head, mut body) = answer.await?.into_parts();
        while let Some(data) = body.data().await {
            body.flow_control().release_capacity(data?.len())?;
        }
        let trailers = body.trailers().await?.filter(|trailers| code(trailers).is_some());
        Ok((head.status.as_u16(), trailers.unwrap_or(head.headers)))
    }

    /// Sends a whole call and takes it back at once.
    pub(crate) async fn reset(&self, path: &str, body: Bytes) -> Result<(), h2::Error> {
        let (_answer, mut stream) = self.begin(path, &[]).await?;
        stream.send_data(body, true)?;
        stream.send_reset(Reason::CANCEL);
        Ok(())
    }
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) http: u16,
    pub(crate) code: Option<Code>,
    /// Whether its details have one that programs can read.
    pub(crate) has_reason: bool,
}

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// `host:port` of an address.
pub(crate) fn host(address: &str) -> &str {
    address.strip_prefix("http://").unwrap()
}

/// A gRPC message, compressed or not as `flag` says.
pub(crate) fn framed(flag: u8, message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + message.len());
    bytes.put_u8(flag);
    bytes.put_u32(u32::try_from(message.len()).unwrap());
    bytes.put_slice(message);
    bytes.freeze()
}

/// A classification of these images by model `m`.
pub(crate) fn classification(images: &[&[u8]]) -> Bytes {
    let images = images.iter().map(|content| Image { content: content.to_vec().into() }).collect();
    let request = ClassifyRequest { model: "m".to_owned(), images, ..Default::default() };
    framed(0, &request.encode_to_vec())
}
