//! Pages of lists: sizes as clients ask for them, and opaque tokens.

use crate::digest::hex;
use crate::error::{Error, Result};

/// Entries of a page when the client does not say.
const DEFAULT_SIZE: usize = 50;
/// Most entries of a page.
const MAX_SIZE: usize = 1000;

/// Where a page starts and how long it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageRequest {
    /// What is listed, with its filter: a token is good for the same list only.
    list: String,
    /// Key of the last entry of the page before.
    pub(crate) after: Option<String>,
    /// Most entries to return.
    pub(crate) size: usize,
}

impl PageRequest {
    /// Reads what a client sent for the list of that name.
    ///
    /// # Errors
    /// `InvalidArgument` on `page_size` or `page_token`.
    pub(crate) fn parse(list: String, page_size: i32, page_token: &str) -> Result<Self> {
        let size = match usize::try_from(page_size) {
            Ok(0) => DEFAULT_SIZE,
            Ok(size) => size.min(MAX_SIZE),
            Err(_) => return Err(Error::invalid("page_size", "must not be negative")),
        };
        let after = (!page_token.is_empty()).then(|| unwrap(&list, page_token)).transpose()?;
        Ok(Self { list, after, size })
    }

    /// Cuts `entries`, of which one more than `size` were fetched, to the page; and the token of
    /// the next page, empty on the last.
    pub(crate) fn cut<T>(&self, entries: &mut Vec<T>, key: impl Fn(&T) -> String) -> String {
        if entries.len() <= self.size {
            return String::new();
        }
        entries.truncate(self.size);
        let last = entries.last().map(key).unwrap_or_default();
        hex(format!("{}\n{last}", self.list).as_bytes())
    }
}

fn unwrap(list: &str, token: &str) -> Result<String> {
    decode_hex(token)
        .and_then(|text| {
            let (of, key) = text.split_once('\n')?;
            (of == list).then(|| key.to_owned())
        })
        .ok_or_else(|| Error::invalid("page_token", "is not a token of this list"))
}

fn decode_hex(text: &str) -> Option<String> {
    let digits = text.chars().map(|c| c.to_digit(16)).collect::<Option<Vec<u32>>>()?;
    let bytes = digits.chunks(2).map(|pair| {
        let [high, low] = pair else { return None };
        u8::try_from(high * 16 + low).ok()
    });
    String::from_utf8(bytes.collect::<Option<Vec<u8>>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(size: i32, token: &str) -> Result<PageRequest> {
        PageRequest::parse("models".to_owned(), size, token)
    }

    #[test]
    fn sizes_have_a_default_and_a_limit() {
        assert_eq!(parse(0, "").unwrap().size, 50);
        assert_eq!(parse(5000, "").unwrap().size, 1000);
        assert!(matches!(
            parse(-1, "").unwrap_err(),
            Error::InvalidArgument { field, .. } if field == "page_size"
        ));
    }

    #[test]
    fn pages_follow_each_other_and_end() {
        let page = parse(2, "").unwrap();
        let mut entries = vec!["a", "b", "c"];
        let token = page.cut(&mut entries, |e| (*e).to_owned());
        assert_eq!(entries, ["a", "b"]);
        let next = parse(2, &token).unwrap();
        assert_eq!(next.after.as_deref(), Some("b"));
        assert_eq!(next.cut(&mut vec!["c"], |e| (*e).to_owned()), "");
    }

    #[test]
    fn foreign_tokens_are_refused() {
        let other = PageRequest::parse("datasets".to_owned(), 1, "").unwrap();
        let token = other.cut(&mut vec!["a", "b"], |e| (*e).to_owned());
        for token in [token.as_str(), "x", "abc", "ff", "é", "00"] {
            assert!(parse(1, token).is_err(), "{token}");
        }
    }
}
