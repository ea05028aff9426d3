//! What each method asks of its caller: one table for all services.

use super::Scope;
use super::Scope::{Admin, Evaluate, Infer, Quantize};

/// What a method asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing: health.
    Open,
    /// To be known, with whatever scope: what there is to work with.
    Known,
    /// One of these scopes.
    Scoped(&'static [Scope]),
    /// One of these scopes; it changes what the server holds, so that it is off where strangers can
    /// call.
    Control(&'static [Scope]),
    /// Scope `admin`, unless the server offers it to everybody.
    Reflection,
}

/// What the method of this path asks for, `/package.Service/Method`. Paths that are not here ask for
/// scope `admin`, so that a method that was forgotten is not open.
pub(super) fn access(path: &str) -> Option<Access> {
    Some(match path {
        "/grpc.health.v1.Health/Check"
        | "/grpc.health.v1.Health/List"
        | "/grpc.health.v1.Health/Watch"
        | "/inference.GRPCInferenceService/ServerLive"
        | "/inference.GRPCInferenceService/ServerReady" => Access::Open,

        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => Access::Reflection,

        "/vitq.v1.ModelService/ListModels"
        | "/vitq.v1.ModelService/GetModel"
        | "/vitq.v1.CatalogService/ListMethods"
        | "/vitq.v1.CheckpointService/ListCheckpoints"
        | "/vitq.v1.CheckpointService/GetCheckpoint"
        | "/vitq.v1.DatasetService/ListDatasets"
        | "/vitq.v1.DatasetService/GetDataset"
        | "/inference.GRPCInferenceService/ServerMetadata" => Access::Known,

        "/vitq.v1.InferenceService/Classify"
        | "/vitq.v1.InferenceService/ClassifyStream"
        | "/inference.GRPCInferenceService/ModelReady"
        | "/inference.GRPCInferenceService/ModelMetadata"
        | "/inference.GRPCInferenceService/ModelConfig"
        | "/inference.GRPCInferenceService/ModelStatistics"
        | "/inference.GRPCInferenceService/ModelInfer"
        | "/inference.GRPCInferenceService/ModelStreamInfer"
        | "/inference.GRPCInferenceService/RepositoryIndex" => Access::Scoped(&[Infer]),

        "/vitq.v1.EvaluationService/Evaluate" | "/vitq.v1.EvaluationService/Watch" => {
            Access::Scoped(&[Evaluate])
        }

        "/vitq.v1.QuantizationService/Quantize" | "/vitq.v1.QuantizationService/Watch" => {
            Access::Scoped(&[Quantize])
        }

        "/google.longrunning.Operations/ListOperations"
        | "/google.longrunning.Operations/GetOperation"
        | "/google.longrunning.Operations/WaitOperation"
        | "/google.longrunning.Operations/CancelOperation"
        | "/google.longrunning.Operations/DeleteOperation" => {
            Access::Scoped(&[Quantize, Evaluate, Admin])
        }

        "/vitq.v1.UploadService/Upload" => Access::Control(&[Quantize]),
        "/vitq.v1.UploadService/GetUpload" | "/vitq.v1.UploadService/ListUploads" => {
            Access::Scoped(&[Quantize])
        }

        "/vitq.v1.ModelService/LoadModel"
        | "/vitq.v1.ModelService/UnloadModel"
        | "/vitq.v1.ModelService/DeleteModel"
        | "/vitq.v1.ModelService/SetAlias"
        | "/vitq.v1.ModelService/DeleteAlias"
        | "/vitq.v1.CheckpointService/DeleteCheckpoint"
        | "/vitq.v1.DatasetService/DeleteDataset"
        | "/inference.GRPCInferenceService/RepositoryModelLoad"
        | "/inference.GRPCInferenceService/RepositoryModelUnload" => Access::Control(&[Admin]),

        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::grpc::proto;

    /// The paths of all methods in some descriptors.
    fn methods(descriptors: &[u8]) -> Vec<String> {
        let files = FileDescriptorSet::decode(descriptors).unwrap().file;
        let path =
            |package: &str, service: &str, method: &str| format!("/{package}.{service}/{method}");
        files
            .iter()
            .flat_map(|file| file.service.iter().map(move |service| (file.package(), service)))
            .flat_map(|(package, service)| {
                let methods = service.method.iter();
                methods.map(move |method| path(package, service.name(), method.name()))
            })
            .collect()
    }

    #[test]
    fn every_method_of_every_service_is_in_the_table() {
        let own = methods(proto::DESCRIPTORS);
        assert!(own.len() >= 29, "{own:?}");
        let others = [
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        for path in own.into_iter().chain(others.into_iter().flat_map(methods)) {
            assert!(access(&path).is_some(), "{path} is missing");
        }
    }

    #[test]
    fn only_health_is_open() {
        let open = |path: &String| access(path) == Some(Access::Open);
        let own: Vec<_> = methods(proto::DESCRIPTORS).into_iter().filter(open).collect();
        let health = ["ServerLive", "ServerReady"];
        assert!(own.iter().all(|path| health.iter().any(|end| path.ends_with(end))), "{own:?}");
        for stranger in ["", "/", "/vitq.v1.InferenceService/classify", "/vitq.v1.ModelService/"] {
            assert_eq!(access(stranger), None, "{stranger}");
        }
    }
}
