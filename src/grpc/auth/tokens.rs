//! The file of tokens and certificate names: one principal a line.
//!
//! ```text
//! # NAME            CREDENTIAL      SCOPES
//! dashboard         sha256:9f86…    infer
//! build.example.org certificate     evaluate,quantize
//! ```
//!
//! A token is 256 random bits, so its plain sha256 is as good as a slow hash. A name may have several
//! lines: a new token is added before the old one is removed.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};
use tokio_rustls::rustls::crypto::aws_lc_rs;

use super::Scopes;
use crate::digest::{hex, sha256_hex};
use crate::error::{Error, Result};

/// How a token starts, so that people and scanners know one when they see it.
const PREFIX: &str = "vitq_";
/// How a hash starts in the file.
const HASH: &str = "sha256:";
/// What stands in the file for a token whose owner shows a certificate.
const CERTIFICATE: &str = "certificate";
/// Longest name of a principal, in bytes.
pub(super) const MAX_NAME: usize = 200;

/// Who is in the file.
#[derive(Debug, Default)]
pub(in crate::grpc) struct Tokens {
    tokens: Vec<(sha2::digest::Output<Sha256>, Entry)>,
    certificates: Vec<Entry>,
}

/// A principal of the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its name in the file.
    pub(super) name: Arc<str>,
    /// What it may do.
    pub(super) scopes: Scopes,
}

/// A new token, and its line in the file.
#[derive(Debug)]
pub struct NewToken {
    /// What the client sends.
    pub token: String,
    /// What the server's file holds.
    pub line: String,
}

/// Draws a token for a principal.
///
/// # Errors
/// `InvalidArgument` on `name`; `Internal` when the system has no randomness.
pub fn new_token(name: &str, scopes: Scopes) -> Result<NewToken> {
    check_name(name)?;
    let mut secret = [0; 32];
    let random = aws_lc_rs::default_provider().secure_random;
    random.fill(&mut secret).map_err(|_| Error::internal("no random numbers"))?;
    let token = format!("{PREFIX}{}", hex(&secret));
    let line = format!("{name} {HASH}{} {scopes}", sha256_hex(token.as_bytes()));
    Ok(NewToken { token, line })
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// `InvalidArgument` on `tokens`, with the number of the line at fault.
    pub(in crate::grpc) fn parse(contents: &[u8]) -> Result<Self> {
        let text = str::from_utf8(contents)
            .map_err(|_| Error::invalid("tokens", "the file is not UTF-8 text"))?;
        let mut all = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            all.add(line)
                .map_err(|error| Error::invalid("tokens", format!("line {number}: {error}")))?;
        }
        Ok(all)
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, credential, scopes] = words[..] else {
            return Err(Error::invalid("line", "is not NAME CREDENTIAL SCOPES"));
        };
        check_name(name)?;
        let entry = Entry { name: name.into(), scopes: Scopes::parse(scopes)? };
        if credential == CERTIFICATE {
            if self.certificates.iter().any(|other| other.name == entry.name) {
                return Err(Error::invalid("name", "has a certificate's line already"));
            }
            self.certificates.push(entry);
            return Ok(());
        }
        let hash = credential.strip_prefix(HASH).and_then(unhex);
        let hash = hash.ok_or_else(|| {
            let reason = "is neither sha256: with 64 hexadecimal digits nor `certificate`";
            Error::invalid("credential", reason) // never shown: it may be a token by mistake
        })?;
        if self.tokens.iter().any(|(other, _)| *other == hash) {
            return Err(Error::invalid("credential", "is another line's, too"));
        }
        self.tokens.push((hash, entry));
        Ok(())
    }

    /// Whose token this is. How long the search takes tells nothing of the hashes in the file:
    /// all are compared, in constant time.
    pub(super) fn of_token(&self, token: &str) -> Option<&Entry> {
        let hash = Sha256::digest(token.as_bytes());
        let mut found = u32::MAX;
        for (index, (known, _)) in (0..).zip(&self.tokens) {
            found.conditional_assign(&index, known.ct_eq(&hash));
        }
        self.tokens.get(usize::try_from(found).ok()?).map(|(_, entry)| entry)
    }

    /// The principal of a certificate, by the first of its names that is in the file.
    pub(super) fn of_certificate(&self, names: &[String]) -> Option<&Entry> {
        names.iter().find_map(|name| self.certificates.iter().find(|entry| *entry.name == **name))
    }
}

/// Names go into logs, quotas and error messages.
fn check_name(name: &str) -> Result<()> {
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    let reason = format!("a name has 1 to {MAX_NAME} visible ASCII characters");
    Err(Error::invalid("name", reason))
}

fn unhex(text: &str) -> Option<sha2::digest::Output<Sha256>> {
    let mut bytes = sha2::digest::Output::<Sha256>::default();
    if text.len() != 2 * bytes.len() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Tokens> {
        Tokens::parse(text.as_bytes())
    }

    #[test]
    fn a_new_token_opens_what_its_line_says() {
        let scopes = Scopes::parse("infer,quantize").unwrap();
        let first = new_token("a", scopes).unwrap();
        let second = new_token("b", Scopes::default()).unwrap();
        assert_ne!(first.token, second.token);
        assert!(first.token.len() == PREFIX.len() + 64 && !first.line.contains(&first.token));
        let third = new_token("a", Scopes::parse("admin").unwrap()).unwrap();
        let text = format!("# ours\n\n  {}\n{}\n", first.line, third.line);
        let tokens = parse(&text).unwrap();
        let found = tokens.of_token(&first.token).unwrap();
        assert_eq!((&*found.name, found.scopes), ("a", scopes));
        assert_eq!(tokens.of_token(&third.token).unwrap().scopes.to_string(), "admin");
        let hash = &first.line["a sha256:".len()..][..64];
        for wrong in ["", "vitq_", hash, &second.token, &first.token[1..]] {
            assert!(tokens.of_token(wrong).is_none(), "{wrong}");
        }
        assert!(new_token("two words", scopes).is_err() && new_token("", scopes).is_err());
    }

    #[test]
    fn certificates_are_found_by_any_of_their_names() {
        let text = "spiffe://x/a certificate infer\nb.example certificate admin\n";
        let tokens = parse(text).unwrap();
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            tokens.of_certificate(&names).map(|entry| entry.name.to_string())
        };
        assert_eq!(of(&["spiffe://x/c", "b.example"]).as_deref(), Some("b.example"));
        assert_eq!(of(&["other"]), None);
        assert!(tokens.of_token("certificate").is_none());
    }

    #[test]
    fn a_wrong_line_is_named_and_its_credential_is_not() {
        let hash = "0".repeat(64);
        for bad in [
            "a vitq_secret infer".to_owned(),
            format!("a sha256:{} infer", &hash[1..]),
            format!("a sha256:{}g infer", &hash[1..]),
            format!("a sha256:{hash} everything"),
            format!("a sha256:{hash}"),
            format!("a sha256:{hash} infer x"),
            format!("a sha256:{hash} infer\nb sha256:{hash} infer"),
            "a certificate infer\na certificate admin".to_owned(),
            format!("{} certificate infer", "n".repeat(MAX_NAME + 1)),
        ] {
            let error = parse(&bad).unwrap_err().to_string();
            assert!(error.starts_with("tokens: line "), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(Tokens::parse(&[0xff]).is_err());
    }
}
