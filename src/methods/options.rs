//! Typed method options: a machine-readable schema, and values checked against it.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// The schema of one option.
#[derive(Debug)]
pub struct OptionSpec {
    /// The name in `--option name=value` and in requests.
    pub name: &'static str,
    /// What it does, one line.
    pub help: &'static str,
    /// Type and range.
    pub kind: OptionKind,
    /// Default value as text; always valid.
    pub default: &'static str,
}

/// Type and range of an option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptionKind {
    /// `true` or `false`.
    Bool,
    /// An integer within the bounds, both included.
    Int {
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
    },
    /// A number within the bounds, both included.
    Float {
        /// Smallest value.
        min: f64,
        /// Largest value.
        max: f64,
    },
    /// One of the names.
    Choice(&'static [&'static str]),
}

/// A checked option value.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    /// Of an [`OptionKind::Bool`].
    Bool(bool),
    /// Of an [`OptionKind::Int`].
    Int(i64),
    /// Of an [`OptionKind::Float`].
    Float(f64),
    /// Of an [`OptionKind::Choice`].
    Choice(&'static str),
}

/// All options of a method, defaults filled in.
#[derive(Clone, Debug, Default)]
pub struct MethodOptions {
    values: BTreeMap<&'static str, OptionValue>,
}

impl MethodOptions {
    /// Checks `given` against `specs` and fills in defaults.
    ///
    /// # Errors
    /// `InvalidArgument` on `options.NAME` for an unknown name, a wrong type or a value out of range.
    pub fn resolve(specs: &'static [OptionSpec], given: &BTreeMap<String, String>) -> Result<Self> {
        for name in given.keys() {
            if !specs.iter().any(|spec| spec.name == name) {
                let known = specs.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
                let reason = match specs {
                    [] => "unknown option, the method takes none".to_owned(),
                    _ => format!("unknown option, known are: {known}"),
                };
                return Err(Error::invalid(format!("options.{name}"), reason));
            }
        }
        let mut values = BTreeMap::new();
        for spec in specs {
            let text = given.get(spec.name).map_or(spec.default, String::as_str);
            values.insert(spec.name, spec.parse(text)?);
        }
        Ok(Self { values })
    }

    /// A boolean option.
    ///
    /// # Errors
    /// `Internal` when the method asks for an option that its schema lacks.
    pub fn bool(&self, name: &str) -> Result<bool> {
        match self.values.get(name) {
            Some(OptionValue::Bool(value)) => Ok(*value),
            _ => Err(Self::missing(name)),
        }
    }

    /// An integer option.
    ///
    /// # Errors
    /// As [`MethodOptions::bool`].
    pub fn int(&self, name: &str) -> Result<i64> {
        match self.values.get(name) {
            Some(OptionValue::Int(value)) => Ok(*value),
            _ => Err(Self::missing(name)),
        }
    }

    /// A number option.
    ///
    /// # Errors
    /// As [`MethodOptions::bool`].
    pub fn float(&self, name: &str) -> Result<f64> {
        match self.values.get(name) {
            Some(OptionValue::Float(value)) => Ok(*value),
            _ => Err(Self::missing(name)),
        }
    }

    /// A choice option.
    ///
    /// # Errors
    /// As [`MethodOptions::bool`].
    pub fn choice(&self, name: &str) -> Result<&'static str> {
        match self.values.get(name) {
            Some(OptionValue::Choice(value)) => Ok(value),
            _ => Err(Self::missing(name)),
        }
    }

    fn missing(name: &str) -> Error {
        Error::internal(format!("option {name} is not in the method's schema"))
    }
}

impl OptionSpec {
    /// Checks a value given as text.
    ///
    /// # Errors
    /// `InvalidArgument` on `options.NAME`.
    pub fn parse(&self, text: &str) -> Result<OptionValue> {
        let refuse = |reason: String| Error::invalid(format!("options.{}", self.name), reason);
        match self.kind {
            OptionKind::Bool => match text {
                "true" => Ok(OptionValue::Bool(true)),
                "false" => Ok(OptionValue::Bool(false)),
                other => Err(refuse(format!("`{other}` is neither true nor false"))),
            },
            OptionKind::Int { min, max } => text
                .parse()
                .ok()
                .filter(|value| (min..=max).contains(value))
                .map(OptionValue::Int)
                .ok_or_else(|| refuse(format!("`{text}` is not an integer from {min} to {max}"))),
            OptionKind::Float { min, max } => text
                .parse()
                .ok()
                .filter(|value| (min..=max).contains(value))
                .map(OptionValue::Float)
                .ok_or_else(|| refuse(format!("`{text}` is not a number from {min} to {max}"))),
            OptionKind::Choice(names) => names
                .iter()
                .find(|name| **name == text)
                .map(|name| OptionValue::Choice(name))
                .ok_or_else(|| refuse(format!("`{text}` is none of {}", names.join(", ")))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::METHODS;

    const SPECS: &[OptionSpec] = &[
        OptionSpec {
            name: "groups",
            help: "",
            kind: OptionKind::Int { min: 1, max: 64 },
            default: "8",
        },
        OptionSpec {
            name: "eps",
            help: "",
            kind: OptionKind::Float { min: 0.0, max: 0.5 },
            default: "0.1",
        },
        OptionSpec { name: "kind", help: "", kind: OptionKind::Choice(&["a", "b"]), default: "a" },
        OptionSpec { name: "on", help: "", kind: OptionKind::Bool, default: "true" },
    ];

    fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn defaults_fill_what_is_not_given() {
        let options = MethodOptions::resolve(SPECS, &given(&[("groups", "4")])).unwrap();
        assert_eq!(options.int("groups").unwrap(), 4);
        assert_eq!(options.float("eps").unwrap(), 0.1);
        assert_eq!(options.choice("kind").unwrap(), "a");
        assert!(options.bool("on").unwrap());
    }

    #[test]
    fn a_bad_value_names_its_option() {
        for (name, value) in [
            ("groups", "0"),
            ("groups", "x"),
            ("eps", "NaN"),
            ("kind", "c"),
            ("on", "1"),
            ("new", "1"),
        ] {
            let error = MethodOptions::resolve(SPECS, &given(&[(name, value)])).unwrap_err();
            let Error::InvalidArgument { field, .. } = error else { panic!("{name}={value}") };
            assert_eq!(field, format!("options.{name}"));
        }
    }

    #[test]
    fn an_unknown_option_is_told_with_the_known_ones() {
        let text =
            |specs| MethodOptions::resolve(specs, &given(&[("new", "1")])).unwrap_err().to_string();
        assert_eq!(text(SPECS), "options.new: unknown option, known are: groups, eps, kind, on");
        assert_eq!(text(&[]), "options.new: unknown option, the method takes none");
    }

    #[test]
    fn every_default_of_every_method_is_valid() {
        for method in METHODS {
            MethodOptions::resolve(method.options, &BTreeMap::new()).unwrap();
        }
    }
}
