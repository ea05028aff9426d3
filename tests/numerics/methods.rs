//! The methods, for tests that give each its own options.

use vitq::methods::METHODS;

/// The options of a request, by name.
pub(crate) type Options = &'static [(&'static str, &'static str)];

/// Every method that quantizes, with options that keep it quick.
pub(crate) fn quantizing() -> impl Iterator<Item = (&'static str, Options)> {
    METHODS.iter().filter(|method| method.id != "float").map(|method| (method.id, quick(method.id)))
}

/// Options that keep a method quick.
pub(crate) fn quick(method: &str) -> Options {
    match method {
        "igq" => &[("allocation", "false")],
        "ias" => &[("iterations", "1")],
        "dopq" => &[("learning", "off")],
        _ => &[],
    }
}
