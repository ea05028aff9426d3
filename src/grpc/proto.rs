//! Code generated from `proto/` at build time. Proto types do not leave `grpc` and `cli`.

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, dead_code)] // not our text
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

use prost::Message as _;
use prost_types::FileDescriptorSet;

pub use generated::google::longrunning;
pub use generated::inference;
pub use generated::vitq::v1::*;

/// Descriptors of every file under `proto/` with their imports, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Full names of the methods that descriptors describe, as `vitq.v1.ModelService/GetModel`.
pub fn methods(descriptors: &[u8]) -> Vec<String> {
    let set = FileDescriptorSet::decode(descriptors).unwrap_or_default(); // from a build, not the wire
    let mut names = Vec::new();
    for file in &set.file {
        for service in &file.service {
            let method = |method: &prost_types::MethodDescriptorProto| {
                format!("{}.{}/{}", file.package(), service.name(), method.name())
            };
            names.extend(service.method.iter().map(method));
        }
    }
    names
}
