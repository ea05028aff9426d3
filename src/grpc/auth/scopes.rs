//! What a principal may do.

use std::fmt;

use clap::ValueEnum;

use crate::error::{Error, Result};

/// A kind of work. None implies another: an `admin` who also classifies has `infer`, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scope {
    /// Classify images.
    Infer,
    /// Evaluate models.
    Evaluate,
    /// Quantize, upload checkpoints and data sets.
    Quantize,
    /// Load, unload, alias and delete models, checkpoints and data sets.
    Admin,
}

impl Scope {
    const ALL: [Self; 4] = [Self::Infer, Self::Evaluate, Self::Quantize, Self::Admin];

    /// Its name in files and tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Evaluate => "evaluate",
            Self::Quantize => "quantize",
            Self::Admin => "admin",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A set of scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// All of them.
    pub fn all() -> Self {
        Scope::ALL.into_iter().collect()
    }

    /// Reads `infer,evaluate`.
    ///
    /// # Errors
    /// `InvalidArgument` on `scopes` for an unknown name.
    pub fn parse(text: &str) -> Result<Self> {
        let known = |name: &str| {
            let found = Scope::ALL.into_iter().find(|scope| scope.name() == name);
            found.ok_or_else(|| {
                let reason = format!(
                    "`{}` is none of infer, evaluate, quantize, admin",
                    name.escape_debug()
                );
                Error::invalid("scopes", reason)
            })
        };
        text.split(',').map(known).collect()
    }

    /// Those of the names that are scopes; others mean something to others.
    pub(super) fn known<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        names.filter_map(|name| Scope::ALL.into_iter().find(|scope| scope.name() == name)).collect()
    }

    /// Whether one of these is in the set.
    pub fn has_any(self, scopes: &[Scope]) -> bool {
        scopes.iter().any(|scope| self.0 & scope.bit() != 0)
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | scope.bit()))
    }
}

impl std::str::FromStr for Scopes {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = Scope::ALL.into_iter().filter(|scope| self.has_any(&[*scope]));
        f.write_str(&held.map(Scope::name).collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_sets_of_names() {
        let some = Scopes::parse("admin,infer").unwrap();
        assert_eq!(some.to_string(), "infer,admin");
        assert!(some.has_any(&[Scope::Quantize, Scope::Admin]));
        assert!(!some.has_any(&[Scope::Quantize, Scope::Evaluate]));
        assert!(!Scopes::default().has_any(&Scope::ALL) && Scopes::all().has_any(&[Scope::Infer]));
        assert_eq!(Scopes::known(["openid", "quantize"].into_iter()).to_string(), "quantize");
        for bad in ["", "all", "infer,", "Infer", "infer, admin"] {
            assert!(Scopes::parse(bad).is_err(), "{bad}");
        }
    }
}
