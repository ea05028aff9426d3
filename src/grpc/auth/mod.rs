//! Who calls, and whether they may: the layer in front of every service.
//!
//! A caller is known by a bearer token of the tokens file, by a JSON Web Token, or by its client
//! certificate, in this order; on a server that asks for none of these, by its address. What a method
//! asks for stands in `access`. It is checked before anything is looked up, so that PERMISSION_DENIED
//! wins over NOT_FOUND.

mod access;
mod jwt;
mod scopes;
mod tokens;

use std::sync::Arc;

use tonic::codegen::http::request::Parts;
use tonic::codegen::http::{HeaderMap, header::AUTHORIZATION};

use super::check::Check;
use super::connections::Peer;
use super::reload::Reloadable;
use crate::error::{BadCredentials, Error, Result};

use access::{Access, access};
use tokens::Entry;

pub(super) use jwt::{Jwt, Keys as JwtKeys};
pub use scopes::{Scope, Scopes};
pub(super) use tokens::Tokens;
pub use tokens::{NewToken, new_token};

/// How the header of a token starts.
const BEARER: &str = "bearer ";

/// Who calls; an extension of each request.
#[derive(Clone, Debug)]
pub(super) struct Principal {
    /// What quotas are counted by: `token:NAME`, `jwt:SUBJECT`, `certificate:NAME`, or
    /// `client:ADDRESS` without its port.
    pub(super) name: Arc<str>,
    /// What it may do.
    scopes: Scopes,
}

impl Principal {
    fn new(kind: &str, entry: &Entry) -> Self {
        Self { name: format!("{kind}:{}", entry.name).into(), scopes: entry.scopes }
    }

    /// A caller of a server that asks nobody who they are.
    fn anonymous(peer: Option<&Peer>) -> Self {
        let name = match peer {
            Some(peer) => format!("client:{}", peer.address.ip().to_canonical()),
            None => "client:unknown".to_owned(),
        };
        Self { name: name.into(), scopes: Scopes::all() }
    }

    /// Checks that it has one of some scopes.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub(super) fn needs(&self, scopes: &[Scope]) -> Result<()> {
        if self.scopes.has_any(scopes) {
            return Ok(());
        }
        let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
        self.denied(format!("scope {}", names.join(" or ")))
    }

    fn denied<T>(&self, needs: String) -> Result<T> {
        Err(Error::PermissionDenied { principal: self.name.to_string(), needs })
    }
}

/// Who made a request.
pub(super) fn principal<T>(request: &tonic::Request<T>) -> Principal {
    let known = request.extensions().get::<Principal>().cloned();
    known.unwrap_or_else(|| Principal::anonymous(request.extensions().get()))
}

/// Decides about callers. Open to everybody by default.
#[derive(Default)]
pub(super) struct Gate {
    /// Principals by token and by certificate.
    pub(super) tokens: Option<Arc<Reloadable<Tokens>>>,
    /// Principals of an issuer.
    pub(super) jwt: Option<Jwt>,
    /// What the owners of verified certificates may do that the file does not name.
    pub(super) certificates: Option<Scopes>,
    /// Whether reflection is for everybody.
    pub(super) reflection: bool,
    /// Whether strangers can call who are asked for nothing.
    pub(super) is_exposed: bool,
}

impl Gate {
    /// Whether callers have to say who they are.
    pub(super) fn authenticates(&self) -> bool {
        self.tokens.is_some() || self.jwt.is_some() || self.certificates.is_some()
    }

    /// Lets a call in, as somebody's.
    ///
    /// # Errors
    /// `Unauthenticated`, `PermissionDenied`.
    fn admit(&self, call: &Parts) -> Result<Principal> {
        let peer = call.extensions.get::<Peer>();
        let access = access(call.uri.path()).unwrap_or(Access::Scoped(&[Scope::Admin]));
        if access == Access::Open || (access == Access::Reflection && self.reflection) {
            return Ok(Principal::anonymous(peer));
        }
        if !self.authenticates() {
            let principal = Principal::anonymous(peer);
            if self.is_exposed && matches!(access, Access::Control(_)) {
                return principal.denied("authentication, which this server lacks,".to_owned());
            }
            return Ok(principal);
        }
        let principal = self.identify(&call.headers, peer)?;
        match access {
            Access::Open | Access::Known => {}
            Access::Scoped(scopes) | Access::Control(scopes) => principal.needs(scopes)?,
            Access::Reflection => principal.needs(&[Scope::Admin])?,
        }
        Ok(principal)
    }

    fn identify(
        &self,
        headers: &HeaderMap,
        peer: Option<&Peer>,
    ) -> Result<Principal, BadCredentials> {
        if let Some(token) = bearer(headers)? {
            return self.of_token(token);
        }
        let names = peer.and_then(|peer| peer.certificate.as_deref());
        let (Some(names), Some(scopes)) = (names, self.certificates) else {
            return Err(BadCredentials::Missing);
        };
        let tokens = self.tokens.as_ref().map(|tokens| tokens.get());
        if let Some(entry) = tokens.as_ref().and_then(|tokens| tokens.of_certificate(names)) {
            return Ok(Principal::new("certificate", entry));
        }
        let name = names.iter().find(|name| name.len() <= tokens::MAX_NAME);
        let name = name.ok_or(BadCredentials::Invalid)?.as_str().into();
        Ok(Principal::new("certificate", &Entry { name, scopes }))
    }

    fn of_token(&self, token: &str) -> Result<Principal, BadCredentials> {
        let tokens = self.tokens.as_ref().map(|tokens| tokens.get());
        if let Some(entry) = tokens.as_ref().and_then(|tokens| tokens.of_token(token)) {
            return Ok(Principal::new("token", entry));
        }
        let jwt = self.jwt.as_ref().ok_or(BadCredentials::Invalid)?;
        Ok(Principal::new("jwt", &jwt.verify(token)?))
    }
}

/// The bearer token of a request, if there is one.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, BadCredentials> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().map_err(|_| BadCredentials::Invalid)?;
    let (scheme, token) = text.split_at_checked(BEARER.len()).ok_or(BadCredentials::Invalid)?;
    if values.next().is_some() || !scheme.eq_ignore_ascii_case(BEARER) {
        return Err(BadCredentials::Invalid);
    }
    Ok(Some(token.trim()))
}

impl Check for Arc<Gate> {
    fn check(&self, call: &mut Parts) -> Result<()> {
        let principal = self.admit(call).inspect_err(|error| {
            let address = call.extensions.get::<Peer>().map(|peer| peer.address);
            let method = call.uri.path();
            tracing::info!(?address, method, %error, "a call was refused");
        })?;
        call.extensions.insert(principal);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
