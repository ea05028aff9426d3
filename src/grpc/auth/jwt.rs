//! JSON Web Tokens of an issuer: RS256 and ES256 only, the algorithm given by the key and never by
//! the token (RFC 8725, sections 3.1 and 3.2).

use std::sync::Arc;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use super::Scopes;
use super::tokens::{Entry, MAX_NAME};
use crate::error::{BadCredentials, Error, Result};
use crate::grpc::reload::Reloadable;

/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 30;

/// Whose tokens are believed, and for whom they must be.
pub(in crate::grpc) struct Jwt {
    /// The issuer's public keys.
    pub(in crate::grpc) keys: Arc<Reloadable<Keys>>,
    /// What claim `iss` must say.
    pub(in crate::grpc) issuer: String,
    /// What claim `aud` must hold.
    pub(in crate::grpc) audience: String,
}

/// The public keys of an issuer.
pub(in crate::grpc) struct Keys(Vec<Key>);

struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(default)]
    scope: ScopeClaim,
}

/// `"infer admin"` (RFC 8693, section 4.2), or a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum ScopeClaim {
    Text(String),
    List(Vec<String>),
}

impl Default for ScopeClaim {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl Jwt {
    /// Whose token this is, and what it may do.
    pub(super) fn verify(&self, token: &str) -> Result<Entry, BadCredentials> {
        let header = decode_header(token).map_err(|_| BadCredentials::Invalid)?;
        // Nothing critical is understood here (RFC 7515, section 4.1.11).
        if header.crit.is_some() {
            return Err(BadCredentials::Invalid);
        }
        let keys = self.keys.get();
        let key = keys.find(header.kid.as_deref()).ok_or(BadCredentials::Invalid)?;
        let mut validation = Validation::new(key.algorithm);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY;
        let Claims { sub, scope } = decode(token, &key.key, &validation)
            .map_err(|error| {
                let is_expired = matches!(error.kind(), ErrorKind::ExpiredSignature);
                if is_expired { BadCredentials::Expired } else { BadCredentials::Invalid }
            })?
            .claims;
        if sub.is_empty() || sub.len() > MAX_NAME || sub.chars().any(char::is_control) {
            return Err(BadCredentials::Invalid);
        }
        let scopes = match &scope {
            ScopeClaim::Text(text) => Scopes::known(text.split(' ')),
            ScopeClaim::List(list) => Scopes::known(list.iter().map(String::as_str)),
        };
        Ok(Entry { name: sub.into(), scopes })
    }
}

impl Keys {
    /// Reads a PEM public key or a JWK set.
    ///
    /// # Errors
    /// `InvalidArgument` on `jwt-key`.
    pub(in crate::grpc) fn parse(contents: &[u8]) -> Result<Self> {
        let refused = |reason: &str| Error::invalid("jwt-key", reason);
        if let Ok(set) = serde_json::from_slice::<JwkSet>(contents) {
            let signs =
                |jwk: &&Jwk| !matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption));
            let keys: Vec<Key> = set.keys.iter().filter(signs).filter_map(key_of).collect();
            if keys.is_empty() {
                return Err(refused("the set has no RSA key and no P-256 key for signatures"));
            }
            return Ok(Self(keys));
        }
        let (algorithm, key) = DecodingKey::from_rsa_pem(contents)
            .map(|key| (Algorithm::RS256, key))
            .or_else(|_| DecodingKey::from_ec_pem(contents).map(|key| (Algorithm::ES256, key)))
            .map_err(|_| refused("is neither a PEM public key (RSA or P-256) nor a JWK set"))?;
        Ok(Self(vec![Key { id: None, algorithm, key }]))
    }

    /// The key that a token names, or the only one.
    fn find(&self, id: Option<&str>) -> Option<&Key> {
        match (&self.0[..], id) {
            ([only], None) => Some(only),
            ([only], Some(_)) if only.id.is_none() => Some(only),
            (keys, Some(id)) => keys.iter().find(|key| key.id.as_deref() == Some(id)),
            (_, None) => None,
        }
    }
}

/// A key of a set, if it is of a kind that is believed. Others may be there for others.
fn key_of(jwk: &Jwk) -> Option<Key> {
    let algorithm = if matches!(jwk.algorithm, AlgorithmParameters::RSA(_)) {
        Algorithm::RS256
    } else if matches!(&jwk.algorithm, AlgorithmParameters::EllipticCurve(curve)
        if curve.curve == EllipticCurve::P256)
    {
        Algorithm::ES256
    } else {
        return None;
    };
    let stated = jwk.common.key_algorithm.as_ref().map(ToString::to_string);
    if stated.is_some_and(|name| name != format!("{algorithm:?}")) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    Some(Key { id: jwk.common.key_id.clone(), algorithm, key })
}
