//! The connection to a server: where it is, whom it must be, and who we are.

use std::error::Error as _;
use std::fmt;
use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, TimeoutExpired};
use url::{Host, Url};

use crate::cli::failure::Failure;
use crate::error::Error;

/// A server that does not answer within this time counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Job streams may be silent for long: pings keep routers from forgetting the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Largest answer that is accepted, in bytes: a long list of models with their reports.
pub(super) const MAX_ANSWER: usize = 64 << 20;

/// A connection whose calls carry the user's token.
pub(super) type Connection = InterceptedService<Channel, Bearer>;

/// Which server to ask.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// The server's URL.
    #[arg(long, value_name = "URL", env = "VITQ_SERVER", default_value = "http://127.0.0.1:50051")]
    pub(super) server: String,
    #[command(flatten)]
    pub(super) credentials: CredentialArgs,
}

/// How client and server know each other.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct CredentialArgs {
    /// Token for the server.
    #[arg(long, value_name = "TOKEN", env = "VITQ_TOKEN", hide_env_values = true)]
    token: Option<Token>,
    /// File that holds the token.
    #[arg(long, value_name = "FILE", env = "VITQ_TOKEN_FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// PEM file of the CAs that a https:// server's certificate may be of; without one, the system's.
    #[arg(long, value_name = "FILE", env = "VITQ_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// PEM file of this client's certificate.
    #[arg(long, value_name = "FILE", env = "VITQ_CLIENT_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file of its private key.
    #[arg(long, value_name = "FILE", env = "VITQ_CLIENT_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Name that the server's certificate must have; without one, the URL's host.
    #[arg(long, value_name = "NAME", env = "VITQ_TLS_SERVER_NAME")]
    tls_server_name: Option<String>,
    /// Send the token over plain http:// to another machine, too.
    #[arg(long, env = "VITQ_CLIENT_INSECURE", value_parser = BoolishValueParser::new())]
    insecure: bool,
}

/// A token: never shown.
#[derive(Clone)]
struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(token)")
    }
}

impl FromStr for Token {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.trim().to_owned()))
    }
}

/// Puts the token on every call.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &self.0 {
            request.metadata_mut().insert("authorization", header.clone());
        }
        Ok(request)
    }
}

impl ServerArgs {
    /// Opens a connection.
    ///
    /// # Errors
    /// `Usage` for text that is no URL and for unusable credentials, `Local` for files that cannot be
    /// read, `Unreachable` when nobody answers.
    pub(super) async fn connect(&self) -> Result<Connection, Failure> {
        let wrong =
            |error: &dyn fmt::Display| Failure::Usage(format!("--server {}: {error}", self.server));
        let url = Url::parse(&self.server).map_err(|error| wrong(&error))?;
        let bearer = self.credentials.bearer(&url)?;
        let mut endpoint =
            Endpoint::from_shared(self.server.clone()).map_err(|error| wrong(&error))?;
        if url.scheme() == "https" {
            let tls = self.credentials.tls()?;
            endpoint = endpoint.tls_config(tls).map_err(|error| wrong(&innermost(&error)))?;
        }
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|error| Failure::Unreachable {
            server: self.server.clone(),
            reason: innermost(&error),
        })?;
        Ok(InterceptedService::new(channel, bearer))
    }
}

impl CredentialArgs {
    fn bearer(&self, url: &Url) -> Result<Bearer, Failure> {
        let token = match (&self.token, &self.token_file) {
            (Some(token), _) => Some(token.0.clone()),
            (None, Some(path)) => {
                let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
                Some(text.trim().to_owned())
            }
            (None, None) => None,
        };
        let Some(token) = token else { return Ok(Bearer(None)) };
        if url.scheme() != "https" && !is_local(url) && !self.insecure {
            let reason = "would cross the network in the clear: use https://, or --insecure";
            return Err(Failure::Usage(format!("the token {reason}")));
        }
        let mut header: MetadataValue<Ascii> = format!("Bearer {token}")
            .parse()
            .map_err(|_| Failure::Usage("the token has unusable characters".to_owned()))?;
        header.set_sensitive(true);
        Ok(Bearer(Some(header)))
    }

    fn tls(&self) -> Result<ClientTlsConfig, Failure> {
        let read = |path: &Path| fs::read(path).map_err(|error| Error::io(path, error));
        let mut tls = match &self.tls_ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        if let Some(name) = &self.tls_server_name {
            tls = tls.domain_name(name);
        }
        Ok(tls)
    }
}

/// Whether what is sent there stays on this machine.
fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).to_canonical().is_loopback(),
        None => false,
    }
}

/// Whether a call failed because its connection did: such a status has one of these codes, and none of
/// the server's details.
pub(super) fn is_broken(status: &Status) -> bool {
    let broken = [Code::Unknown, Code::Cancelled, Code::Internal];
    status.code() == Code::Unavailable
        || broken.contains(&status.code()) && status.details().is_empty()
}

/// What a call with a deadline ended with: of its own timer tonic says that the call was cancelled.
pub(super) fn in_time<T>(ended: Result<T, Status>) -> Result<T, Status> {
    ended.map_err(|status| {
        let mut source = status.source();
        while let Some(error) = source {
            if error.is::<TimeoutExpired>() {
                return Status::deadline_exceeded("deadline exceeded");
            }
            source = error.source();
        }
        status
    })
}

/// Runs a client's work on a runtime of its own.
///
/// # Errors
/// What the work reports; `Local` when the system gives no threads.
pub(super) fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("runtime", error))?
        .block_on(work)
}

/// The transport's outer errors only say that something failed.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        server: ServerArgs,
    }

    fn bearer(words: &str) -> Result<Option<String>, Failure> {
        let words = ["vitq"].into_iter().chain(words.split_whitespace());
        let ServerArgs { server, credentials } = Command::parse_from(words).server;
        let Bearer(header) = credentials.bearer(&Url::parse(&server).unwrap())?;
        Ok(header.map(|header| header.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_token_leaves_this_machine_only_encrypted() {
        for server in ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"] {
            let sent = bearer(&format!("--server {server} --token t")).unwrap();
            assert_eq!(sent.as_deref(), Some("Bearer t"), "{server}");
        }
        assert!(bearer("--server https://example.org --token t").unwrap().is_some());
        assert!(bearer("--server http://example.org --token t --insecure").unwrap().is_some());
        for server in ["http://example.org", "http://192.0.2.1", "http://localhost.example.org"] {
            let refused = bearer(&format!("--server {server} --token t"));
            assert!(matches!(refused, Err(Failure::Usage(_))), "{server}");
            assert!(bearer(&format!("--server {server}")).unwrap().is_none());
        }
    }

    #[test]
    fn a_token_comes_from_a_flag_or_a_file_and_is_not_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "from-file\n").unwrap();
        let sent = bearer(&format!("--token-file {}", file.path().display())).unwrap();
        assert_eq!(sent.as_deref(), Some("Bearer from-file"));
        assert!(matches!(bearer("--token-file /nowhere"), Err(Failure::Local(_))));
        let words = ["vitq", "--token", "secret"];
        assert!(!format!("{:?}", Command::parse_from(words).server).contains("secret"));
        for words in
            [&["vitq", "--token", "a", "--token-file", "b"][..], &["vitq", "--tls-cert", "c"]]
        {
            assert!(Command::try_parse_from(words).is_err());
        }
    }
}
