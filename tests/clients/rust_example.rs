//! Classifies an image, as docs/clients.md tells it.

use tonic::transport::Endpoint;
use vitq::grpc::proto::classify_item::Outcome;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::{ClassifyRequest, Image};

/// The most probable label, and its probability.
pub(crate) async fn classify(
    server: String,
    model: &str,
    image: Vec<u8>,
) -> Result<(String, f32), Box<dyn std::error::Error>> {
    let mut client = InferenceServiceClient::new(Endpoint::new(server)?.connect().await?);
    let request = ClassifyRequest {
        model: model.to_owned(),
        images: vec![Image { content: image.into() }],
        top_k: 1,
        ..ClassifyRequest::default()
    };
    let mut items = client.classify(request).await?.into_inner().items;
    match items.remove(0).outcome {
        Some(Outcome::Result(mut found)) => {
            let best = found.labels.remove(0);
            Ok((best.label, best.probability))
        }
        Some(Outcome::Error(error)) => Err(error.message.into()),
        None => Err("no outcome".into()),
    }
}
