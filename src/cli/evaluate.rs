//! `vitq evaluate`: accuracy and fidelity of a server's model, watched to the end.

use serde_json::json;

use crate::cli::client::{MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::follow::{Outcome, Patience, follow, how_to_return};
use crate::cli::output::Output;
use crate::cli::render;
use crate::grpc::proto::EvaluateRequest;
use crate::grpc::proto::evaluation_service_client::EvaluationServiceClient;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model id or alias.
    #[arg(long, value_name = "ID")]
    model: String,
    /// Data set: a folder of class folders below the server's --datasets.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// Evaluate only that many images, drawn by the seed.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: u32,
    /// Seed of the draw.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Your id of this request: repeating it returns the same job.
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    request_id: String,
    /// Only check the request.
    #[arg(long)]
    validate_only: bool,
    /// Urgency: jobs with a larger number start first, -100 to 100.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Leave as soon as the server has accepted the job.
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    server: ServerArgs,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let patience = if self.detach { Patience::UntilAccepted } else { Patience::ToTheEnd };
        let request = EvaluateRequest {
            model: self.model,
            dataset: self.dataset,
            limit: self.limit,
            seed: self.seed,
            request_id: self.request_id,
            validate_only: self.validate_only,
            priority: self.priority,
        };
        let server = self.server;
        block_on(async move {
            let client = EvaluationServiceClient::new(server.connect().await?)
                .max_decoding_message_size(MAX_ANSWER);
            let events = client.clone().evaluate(request).await?.into_inner();
            let again = async |from| Ok(client.clone().watch(from).await?.into_inner());
            match follow(events, again, patience, &server.server).await? {
                Outcome::Validated => {
                    output.result("the request is valid", &json!({ "valid": true }))
                }
                Outcome::Detached(operation) => output.result(
                    format!("{operation}\n{}", how_to_return(&operation, &server.server)),
                    &json!({ "operation": operation }),
                ),
                Outcome::Done { operation, result } => output.result(
                    render::evaluated_text(&result),
                    &render::evaluated_json(&operation, &result),
                ),
            }
        })
    }
}
