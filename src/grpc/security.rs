//! Flags of security, what they must not be combined to, and what they stand for.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::BoolishValueParser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;
use tokio_rustls::rustls::ServerConfig as TlsConfig;

use super::auth::{Gate, Jwt, JwtKeys, Scopes, Tokens};
use super::reload::{Reload, Reloadable};
use super::tls::{self, TlsFiles};
use crate::error::{Error, Result};

/// How often files are looked at: certificates are renewed days before they end.
const LOOK: Duration = Duration::from_secs(10);

/// Who may connect, and who may do what.
#[derive(Args, Clone, Debug)]
pub struct SecurityConfig {
    /// PEM file of the server's certificate, followed by those that lead to its CA: makes the server
    /// speak TLS. Read again when it changes, and on SIGHUP, as are the files of the flags below.
    #[arg(long, env = "VITQ_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    #[arg(long, env = "VITQ_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// PEM file of the CAs of client certificates: every client needs one then.
    #[arg(long, env = "VITQ_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Scopes of clients whose certificate the tokens file does not name.
    #[arg(long, env = "VITQ_CLIENT_CERT_SCOPES", default_value = "infer", value_name = "SCOPES")]
    pub client_cert_scopes: Scopes,
    /// File of tokens, made by `vitq token`, and of names of client certificates.
    #[arg(long, env = "VITQ_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Whose JSON Web Tokens are believed: claim `iss`.
    #[arg(long, env = "VITQ_JWT_ISSUER", value_name = "TEXT",
          requires_all = ["jwt_audience", "jwt_key"])]
    pub jwt_issuer: Option<String>,
    /// For whom they must be: claim `aud`.
    #[arg(long, env = "VITQ_JWT_AUDIENCE", value_name = "TEXT", requires = "jwt_issuer")]
    pub jwt_audience: Option<String>,
    /// The issuer's public keys: a PEM file (RSA or P-256) or a JWK set.
    #[arg(long, env = "VITQ_JWT_KEY", value_name = "FILE", requires = "jwt_issuer")]
    pub jwt_key: Option<PathBuf>,
    /// Offer gRPC reflection to everybody; without authentication it is offered anyway.
    #[arg(long, env = "VITQ_REFLECTION", value_parser = BoolishValueParser::new())]
    pub reflection: bool,
    /// Allow what is unsafe: an open server, or tokens without TLS, on an address that others reach.
    #[arg(long, env = "VITQ_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,
}

impl SecurityConfig {
    /// Refuses what would be unsafe by accident on this address.
    ///
    /// # Errors
    /// `InvalidArgument` on `listen`.
    pub fn check(&self, listen: SocketAddr) -> Result<()> {
        if listen.ip().is_loopback() || self.insecure || self.tls_cert.is_some() {
            return Ok(());
        }
        let why = if self.tokens.is_some() || self.jwt_issuer.is_some() {
            "tokens would cross the network in the clear"
        } else {
            "anybody who reaches it could use the server"
        };
        let reason = format!(
            "{listen} is not a loopback address, and {why}: give --tls-cert and --tls-key \
             (docs/security.md), or --insecure where the network itself is trusted"
        );
        Err(Error::invalid("listen", reason))
    }

    /// Reads the files. Blocking.
    ///
    /// # Errors
    /// `Io`, or `InvalidArgument` on the flag whose file is unusable.
    pub fn open(&self, listen: SocketAddr) -> Result<Security> {
        let tls = self.tls_files().map(tls::open).transpose()?.map(Arc::new);
        let parse = |contents: &[Vec<u8>]| Tokens::parse(&contents.concat());
        let tokens = self.tokens.clone().map(|file| Reloadable::open(vec![file], parse));
        let tokens = tokens.transpose()?.map(Arc::new);
        let jwt = self.jwt()?;
        let mut files: Vec<Arc<dyn Reload>> = Vec::new();
        files.extend(tls.clone().map(|tls| tls as Arc<dyn Reload>));
        files.extend(tokens.clone().map(|tokens| tokens as Arc<dyn Reload>));
        files.extend(jwt.as_ref().map(|jwt| Arc::clone(&jwt.keys) as Arc<dyn Reload>));
        let gate = Gate {
            tokens,
            jwt,
            certificates: self.tls_client_ca.as_ref().map(|_| self.client_cert_scopes),
            reflection: self.reflection,
            is_exposed: !listen.ip().is_loopback() && !self.insecure,
        };
        Ok(Security { tls, gate: Arc::new(gate), files: files.into() })
    }

    fn tls_files(&self) -> Option<TlsFiles> {
        Some(TlsFiles {
            certificate: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_ca: self.tls_client_ca.clone(),
        })
    }

    fn jwt(&self) -> Result<Option<Jwt>> {
        let (Some(issuer), Some(audience), Some(file)) =
            (self.jwt_issuer.clone(), self.jwt_audience.clone(), self.jwt_key.clone())
        else {
            return Ok(None);
        };
        let parse = |contents: &[Vec<u8>]| JwtKeys::parse(&contents.concat());
        let keys = Arc::new(Reloadable::open(vec![file], parse)?);
        Ok(Some(Jwt { keys, issuer, audience }))
    }
}

/// Who may connect, and who may do what, as the files say it now. By default everybody may do
/// everything.
#[derive(Clone)]
pub struct Security {
    pub(super) tls: Option<Arc<Reloadable<TlsConfig>>>,
    pub(super) gate: Arc<Gate>,
    files: Arc<[Arc<dyn Reload>]>,
}

impl Default for Security {
    fn default() -> Self {
        Self { tls: None, gate: Arc::default(), files: Arc::new([]) }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Security")
            .field("tls", &self.tls.is_some())
            .field("authenticates", &self.gate.authenticates())
            .finish_non_exhaustive()
    }
}

impl Security {
    /// Whether connections are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Reads the files that have changed. One that is unusable is logged, and what was read before
    /// goes on. Blocking.
    pub fn reload(&self) {
        for value in &*self.files {
            let files = value.files();
            match value.reload() {
                Ok(true) => tracing::info!(?files, "read again"),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(?files, %error, "cannot be used, what was read before goes on");
                }
            }
        }
    }

    /// Follows the files for ever: looks every few seconds, and on SIGHUP.
    ///
    /// # Errors
    /// `Io` when the signal cannot be listened to.
    pub(super) async fn follow(self) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let hangup = signal(SignalKind::hangup());
        let mut hangup = hangup.map_err(|error| Error::io("signal handler", error))?;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                _ = hangup.recv() => tracing::info!("SIGHUP: looking at the files"),
            }
            let security = self.clone();
            let read = tokio::task::spawn_blocking(move || security.reload()).await;
            read.map_err(|error| Error::internal(format!("reading files: {error}")))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        security: SecurityConfig,
    }

    fn flags(words: &str) -> Result<SecurityConfig, clap::Error> {
        Command::try_parse_from(["vitq"].into_iter().chain(words.split_whitespace()))
            .map(|command| command.security)
    }

    #[test]
    fn only_loopback_needs_no_protection() {
        for (listen, words, is_safe) in [
            ("127.0.0.1:1", "", true),
            ("[::1]:1", "--tokens t", true),
            ("0.0.0.0:1", "", false),
            ("[::]:1", "", false),
            ("192.0.2.7:1", "--tokens t", false),
            ("192.0.2.7:1", "--jwt-issuer i --jwt-audience a --jwt-key k", false),
            ("192.0.2.7:1", "--tls-cert c --tls-key k", true),
            ("0.0.0.0:1", "--tokens t --insecure", true),
        ] {
            let checked = flags(words).unwrap().check(listen.parse().unwrap());
            assert_eq!(checked.is_ok(), is_safe, "{listen} {words}: {checked:?}");
            assert!(checked.err().is_none_or(|error| error.to_string().contains("--insecure")));
        }
    }

    #[test]
    fn flags_that_need_each_other_come_together() {
        for words in [
            "--tls-cert c",
            "--tls-key k",
            "--tls-client-ca a",
            "--jwt-issuer i",
            "--jwt-issuer i --jwt-audience a",
            "--jwt-key k",
            "--client-cert-scopes root",
        ] {
            assert!(flags(words).is_err(), "{words}");
        }
    }
}
