//! TLS: what the server shows, whom it believes, and what a client certificate says of its owner.
//!
//! TLS 1.2 and 1.3 with rustls' safe defaults, HTTP/2 only. A new certificate counts for the
//! connections that are opened after it was read; those that are open go on.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::reload::Reloadable;
use crate::error::{Error, Result};

/// The only protocol that is spoken inside.
const HTTP2: &[u8] = b"h2";
/// Names of one certificate that are looked at.
const MAX_NAMES: usize = 32;

/// The files of a server's TLS, all PEM.
#[derive(Clone, Debug)]
pub(super) struct TlsFiles {
    /// The server's certificate, then those that lead to its CA.
    pub(super) certificate: PathBuf,
    /// Its private key.
    pub(super) key: PathBuf,
    /// CAs of client certificates; with it, every client needs one.
    pub(super) client_ca: Option<PathBuf>,
}

/// The TLS settings that follow their files. Blocking.
///
/// # Errors
/// `Io`; `InvalidArgument` on the flag whose file is unusable.
pub(super) fn open(files: TlsFiles) -> Result<Reloadable<ServerConfig>> {
    let TlsFiles { certificate, key, client_ca } = files;
    let files = [certificate, key].into_iter().chain(client_ca).collect();
    Reloadable::open(files, server_config)
}

fn server_config(contents: &[Vec<u8>]) -> Result<ServerConfig> {
    let [certificate, key, client_ca @ ..] = contents else {
        return Err(Error::internal("a server needs a certificate and a key"));
    };
    let chain = certificates(certificate, "tls-cert")?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| Error::invalid("tls-key", format!("is no PEM private key: {error}")))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::internal(format!("TLS versions: {error}")))?;
    let builder = match client_ca.first() {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let unusable = |error: &dyn std::fmt::Display| {
                Error::invalid("tls-client-ca", format!("is unusable: {error}"))
            };
            let mut roots = RootCertStore::empty();
            for certificate in certificates(pem, "tls-client-ca")? {
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().map_err(|error| unusable(&error))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        Error::invalid("tls-cert", format!("cannot be used with its key: {error}"))
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(config)
}

fn certificates(pem: &[u8], flag: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Error::invalid(flag, "holds no PEM certificate")),
        Err(error) => Err(Error::invalid(flag, format!("is no PEM certificate: {error}"))),
    }
}

/// The names of a verified certificate's owner: its URIs (SPIFFE ids), then its DNS names in lower
/// case.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    let uris = certificate.valid_uri_names().map(str::to_owned);
    let hosts = certificate.valid_dns_names().map(str::to_ascii_lowercase);
    uris.chain(hosts).take(MAX_NAMES).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn field(error: &Error) -> &str {
        let Error::InvalidArgument { field, .. } = error else { panic!("{error}") };
        field
    }

    #[test]
    fn files_that_do_not_fit_are_refused_by_flag() {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap().pem().into_bytes();
        let (key, other) = (key.serialize_pem().into_bytes(), other.serialize_pem().into_bytes());
        let none = b"nothing".to_vec();
        let config = server_config(&[certificate.clone(), key.clone()]).unwrap();
        assert_eq!(config.alpn_protocols, [b"h2"]);
        for (flag, files) in [
            ("tls-cert", vec![none.clone(), key.clone()]),
            ("tls-key", vec![certificate.clone(), none.clone()]),
            ("tls-cert", vec![certificate.clone(), other]),
            ("tls-client-ca", vec![certificate.clone(), key.clone(), none]),
        ] {
            assert_eq!(field(&server_config(&files).unwrap_err()), flag);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cert.pem");
        fs::write(&path, &certificate).unwrap();
        let missing = folder.path().join("key.pem");
        let files = TlsFiles { certificate: path, key: missing, client_ca: None };
        assert!(matches!(open(files), Err(Error::Io { .. })));
    }

    #[test]
    fn a_certificate_names_its_owner_uris_first() {
        let mut params = CertificateParams::new(vec!["Runner.Example.org".to_owned()]).unwrap();
        let uri = "spiffe://example.org/trainer".try_into().unwrap();
        params.subject_alt_names.push(SanType::URI(uri));
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let seen = names(certificate.der());
        assert_eq!(seen, ["spiffe://example.org/trainer", "runner.example.org"]);
        assert!(names(&CertificateDer::from(vec![1, 2, 3])).is_empty());
    }
}
