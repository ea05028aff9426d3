//! The methods, for tests that give each its own options.

/// Every method that quantizes, with options that keep it quick.
pub(crate) const METHODS: [(&str, &[(&str, &str)]); 8] = [
    ("minmax", &[]),
    ("ubb", &[]),
    ("ptq4vit", &[]),
    ("repq", &[]),
    ("igq", &[("allocation", "false")]),
    ("ias", &[("iterations", "1")]),
    ("dopq", &[("learning", "off")]),
    ("vitq", &[]),
];
