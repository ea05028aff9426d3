//! Code generated from `proto/` at build time. Proto types do not leave `grpc` and `cli`.

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, dead_code)] // not our text
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

pub use generated::google::longrunning;
pub use generated::inference;
pub use generated::vitq::v1::*;

/// Descriptors of every file under `proto/` with their imports, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
