//! Exceptions from a request's bit widths: roles with precisions of their own.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::Role;
use crate::quant::Precision;

/// Field at fault when an exception is unusable.
const FIELD: &str = "role_bits";

/// What a role's operands get instead of what the request and the stem/head policy say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolePrecision {
    /// Of the weights; float for the attention products, which have none.
    pub weights: Precision,
    /// Of the activations.
    pub activations: Precision,
}

/// Exceptions by role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RoleBits(BTreeMap<Role, RolePrecision>);

impl RoleBits {
    /// Adds an exception; `weights` is `None` for the attention products, and only for them.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` for a role that has one already, or the wrong number of
    /// precisions.
    pub fn insert(
        &mut self,
        role: Role,
        weights: Option<Precision>,
        activations: Precision,
        field: &str,
    ) -> Result<()> {
        let name = role.name();
        if weights.is_some() == role.is_matmul() {
            let reason = if role.is_matmul() { "has no weights" } else { "needs weight bits" };
            return Err(Error::invalid(field, format!("{name} {reason}")));
        }
        let precision = RolePrecision { weights: weights.unwrap_or(Precision::Float), activations };
        match self.0.insert(role, precision) {
            None => Ok(()),
            Some(_) => Err(Error::invalid(field, format!("{name} is given twice"))),
        }
    }

    /// Adds an exception written as `reduction=8/8`, `fc2=4/float` (weights/activations), or, for
    /// the attention products, `query_key=8`.
    ///
    /// # Errors
    /// `InvalidArgument` on `role_bits`.
    pub fn insert_text(&mut self, text: &str) -> Result<()> {
        let (role, bits) = text.split_once('=').ok_or_else(|| {
            Error::invalid(FIELD, format!("`{text}` is not ROLE=WEIGHTS/ACTIVATIONS"))
        })?;
        let role = Role::parse(role, FIELD)?;
        let precision = |text| Precision::parse(text, FIELD);
        match bits.split_once('/') {
            Some((weights, activations)) => {
                self.insert(role, Some(precision(weights)?), precision(activations)?, FIELD)
            }
            None => self.insert(role, None, precision(bits)?, FIELD),
        }
    }

    /// The exception of a role, if it has one.
    pub fn get(&self, role: Role) -> Option<RolePrecision> {
        self.0.get(&role).copied()
    }

    /// Whether there are no exceptions.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All exceptions, in the order of a forward.
    pub fn iter(&self) -> impl Iterator<Item = (Role, RolePrecision)> {
        self.0.iter().map(|(role, precision)| (*role, *precision))
    }
}

/// As [`RoleBits::insert_text`] reads them, separated by spaces.
impl fmt::Display for RoleBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (role, RolePrecision { weights, activations })) in self.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{}=", role.name())?;
            if role.is_matmul() {
                write!(f, "{activations}")?;
            } else {
                write!(f, "{weights}/{activations}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_are_read_back() {
        let mut bits = RoleBits::default();
        for text in ["reduction=8/8", "fc2=4/float", "query_key=6", "head=float/float"] {
            bits.insert_text(text).unwrap();
        }
        let text = bits.to_string();
        assert_eq!(text, "query_key=6 fc2=4/float reduction=8/8 head=float/float");
        let mut again = RoleBits::default();
        for part in text.split(' ') {
            again.insert_text(part).unwrap();
        }
        let json = serde_json::to_string(&bits).unwrap();
        assert!(json.starts_with(r#"{"query_key":{"weights":32,"activations":6}"#), "{json}");
        assert_eq!(serde_json::from_str::<RoleBits>(&json).unwrap(), bits);
        assert_eq!(again, bits);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in
            ["fc2", "fc2=4", "query_key=4/4", "attn=4/4", "fc2=2/4", "fc2=4/9", "fc2=4/4/4", "="]
        {
            let error = RoleBits::default().insert_text(text).unwrap_err();
            let ok = matches!(&error, Error::InvalidArgument { field, .. } if field == FIELD);
            assert!(ok, "{text}: {error}");
        }
        let mut bits = RoleBits::default();
        bits.insert_text("fc2=4/4").unwrap();
        assert!(bits.insert_text("fc2=4/4").is_err());
    }
}
