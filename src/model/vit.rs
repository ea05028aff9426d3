//! placeholder
use crate::model::FamilyEntry;
pub(super) const FAMILY: FamilyEntry = FamilyEntry {
    id: "vit",
    variants: &[],
    owns: |_| false,
    resolve: |_| Ok(()),
    canonical_name: |_, n| Some(n.to_owned()),
    build: |_, _, _, _| Ok(vec![]),
};
