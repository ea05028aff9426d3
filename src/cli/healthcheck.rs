//! `vitq healthcheck`: whether a server is ready, for containers without other tools.

use std::time::Duration;

use serde_json::json;
use tonic::Request;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::client::{ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::config::seconds;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// What is asked for: a service by its full name, `liveness`, or `model/ID`. Without it, the
    /// server's readiness.
    #[arg(long, default_value = "", value_name = "NAME", hide_default_value = true)]
    service: String,
    /// Seconds that connection and answer may take together.
    #[arg(long, default_value = "3", value_name = "SECONDS", value_parser = seconds)]
    timeout: Duration,
}

impl Args {
    /// Succeeds when the answer is SERVING.
    ///
    /// # Errors
    /// `Unfinished` for any other answer; `Refused` for an unknown name; `Unreachable`.
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let Self { server, service, timeout } = self;
        let url = server.server.clone();
        let check = async {
            let mut client = HealthClient::new(server.connect().await?);
            let request = Request::new(HealthCheckRequest { service });
            Ok::<_, Failure>(client.check(request).await?.into_inner().status())
        };
        block_on(async {
            let late = |_| Failure::Unreachable {
                server: url,
                reason: format!("no answer within {} s", timeout.as_secs_f64()),
            };
            let status = tokio::time::timeout(timeout, check).await.map_err(late)??;
            let name = status.as_str_name();
            if status != ServingStatus::Serving {
                return Err(Failure::Unfinished(name.to_owned()));
            }
            output.result(name, &json!({ "status": name }))
        })
    }
}
