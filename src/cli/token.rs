//! `vitq token`: a new token for a server's file.

use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::grpc::auth::{NewToken, Scopes, new_token};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Whose token it is: what quotas and logs call its owner.
    #[arg(value_name = "NAME")]
    name: String,
    /// What it opens: infer, evaluate, quantize, admin, comma-separated. None implies another.
    #[arg(long, value_name = "SCOPES")]
    scopes: Scopes,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let NewToken { token, line } = new_token(&self.name, self.scopes)?;
        let text = format!("token: {token}\nline:  {line}");
        output.result(text, &json!({ "token": token, "line": line }))
    }
}
