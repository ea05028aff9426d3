//! What models look like from outside: metadata, configuration, repository index.

use std::collections::BTreeMap;

use super::input::{IMAGE, PIXELS};
use super::output::SOURCES;
use super::tensors::DataType;
use crate::engine::Engine;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelState, ModelView};
use crate::error::{Error, Result};
use crate::grpc::proto::inference::model_config::SchedulingChoice;
use crate::grpc::proto::inference::model_input::Format;
use crate::grpc::proto::inference::model_instance_group::Kind;
use crate::grpc::proto::inference::model_metadata_response::TensorMetadata;
use crate::grpc::proto::inference::repository_index_response::ModelIndex;
use crate::grpc::proto::inference::{
    self, ModelConfig, ModelDynamicBatching, ModelInput, ModelInstanceGroup, ModelMetadataResponse,
    ModelOutput, ModelParameter, ModelTransactionPolicy,
};
use crate::grpc::status::status;

/// The version of every model. What changes has another id; clients expect a number here.
pub(super) const VERSION: &str = "1";
/// What computes.
const PLATFORM: &str = "vitq";
/// As many as there are images.
const IMAGES: i64 = -1;
/// Levels of `priority`.
const PRIORITIES: u64 = 2;

/// The model that answers under a name now; `field` and text of the name.
///
/// # Errors
/// `InvalidArgument` on `field`; `NotFound` for the model or its version; `Unavailable`.
pub(super) async fn find(
    engine: &Engine,
    (field, name): (&str, &str),
    version: &str,
) -> Result<ModelView> {
    let id = engine.registry.answering(&ModelId::parse(name, field)?).await?;
    let view = engine.registry.get(&id)?;
    check_version(&id, version)?;
    Ok(view)
}

/// Whether the model has that version.
///
/// # Errors
/// `NotFound`.
fn check_version(id: &ModelId, version: &str) -> Result<()> {
    if version.is_empty() || version == VERSION {
        return Ok(());
    }
    let name = format!("{id}/{}", version.escape_debug());
    Err(Error::NotFound { kind: "version", name })
}

/// Inputs, outputs and properties of a model, under the name that the client uses.
///
/// # Errors
/// `Internal` when its preprocessing cannot be written.
pub(super) fn metadata(name: String, view: &ModelView) -> Result<ModelMetadataResponse> {
    let spec = &view.record.model;
    let side = spec.preprocessing.image_size;
    let tensor = |name: &str, kind: DataType, shape: &[i64]| TensorMetadata {
        name: name.to_owned(),
        datatype: kind.name().to_owned(),
        shape: shape.to_vec(),
    };
    let output = |name| tensor(name, DataType::Fp32, &[IMAGES, spec.num_classes]);
    Ok(ModelMetadataResponse {
        name,
        versions: vec![VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: vec![
            tensor(IMAGE, DataType::Bytes, &[IMAGES, 1]),
            tensor(PIXELS, DataType::Fp32, &[IMAGES, 3, side, side]),
        ],
        outputs: SOURCES.iter().map(|source| output(source.name())).collect(),
        properties: properties(view)?,
    })
}

/// What clients may want to know of a model, as text.
fn properties(view: &ModelView) -> Result<BTreeMap<String, String>> {
    let ModelView { record, backend, .. } = view;
    let preprocessing = serde_json::to_string(&record.model.preprocessing)
        .map_err(|error| Error::internal(format!("preprocessing of {}: {error}", record.id)))?;
    let properties = [
        ("model", record.id.clone()),
        ("digest", record.digest.clone()),
        ("architecture", record.model.architecture.clone()),
        ("method", record.request.method.clone()),
        ("weight_bits", record.request.weight_bits.to_string()),
        ("activation_bits", record.request.activation_bits.to_string()),
        ("executor", backend.name().to_owned()),
        // What makes `pixels` of an image: JSON.
        ("preprocessing", preprocessing),
    ];
    Ok(properties.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// Limits, inputs, outputs and placement of a model; `images` fit into one call.
///
/// # Errors
/// As [`metadata`].
pub(super) fn config(name: String, view: &ModelView, images: usize) -> Result<ModelConfig> {
    let spec = &view.record.model;
    let side = spec.preprocessing.image_size;
    let parameter = |(key, value)| (key, ModelParameter { string_value: value });
    let output = |name: &str| ModelOutput {
        name: name.to_owned(),
        data_type: inference::DataType::TypeFp32.into(),
        dims: vec![spec.num_classes],
    };
    // One of the two is needed, which a configuration cannot say.
    let image = ModelInput {
        name: IMAGE.to_owned(),
        data_type: inference::DataType::TypeString.into(),
        format: Format::None.into(),
        dims: vec![1],
        reshape: None,
        optional: true,
    };
    let pixels = ModelInput {
        name: PIXELS.to_owned(),
        data_type: inference::DataType::TypeFp32.into(),
        format: Format::Nchw.into(),
        dims: vec![3, side, side],
        reshape: None,
        optional: true,
    };
    Ok(ModelConfig {
        name,
        platform: PLATFORM.to_owned(),
        backend: PLATFORM.to_owned(),
        max_batch_size: i32::try_from(images).unwrap_or(i32::MAX),
        input: vec![image, pixels],
        output: SOURCES.iter().map(|source| output(source.name())).collect(),
        instance_group: instances(&view.state),
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching {
            priority_levels: PRIORITIES,
            default_priority_level: 1,
            ..ModelDynamicBatching::default()
        })),
        parameters: properties(view)?.into_iter().map(parameter).collect(),
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: false }),
    })
}

fn instances(state: &ModelState) -> Vec<ModelInstanceGroup> {
    let ModelState::Ready(placement) = state else { return Vec::new() };
    let name = placement.device.name();
    let gpu = gpu(name);
    vec![ModelInstanceGroup {
        name: name.to_owned(),
        count: 1,
        gpus: gpu.into_iter().collect(),
        kind: if gpu.is_some() { Kind::Gpu } else { Kind::Cpu }.into(),
    }]
}

/// The number of the GPU of that name: `cuda:1`.
pub(super) fn gpu(device: &str) -> Option<i32> {
    device.strip_prefix("cuda:")?.parse().ok()
}

/// A model's line in the repository's index.
pub(super) fn index(view: &ModelView) -> ModelIndex {
    let (state, reason) = match &view.state {
        ModelState::Ready(_) => ("READY", String::new()),
        ModelState::Loading => ("LOADING", String::new()),
        ModelState::Stored => ("UNAVAILABLE", "unloaded".to_owned()),
        // The cause was logged, with the model's id, when the load failed.
        ModelState::Failed(error) => {
            ("UNAVAILABLE", status(error, &view.record.id).message().to_owned())
        }
    };
    ModelIndex {
        name: view.record.id.clone(),
        version: VERSION.to_owned(),
        state: state.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::artifact::store::example_record;
    use crate::exec::Backend;

    fn view(state: ModelState) -> ModelView {
        let record = Arc::new(example_record("m", "d1"));
        ModelView { record, state, backend: Backend::Simulated, aliases: Vec::new() }
    }

    #[test]
    fn metadata_and_configuration_tell_the_same() {
        let view = view(ModelState::Stored);
        let metadata = metadata("live".to_owned(), &view).unwrap();
        assert_eq!(
            (metadata.name.as_str(), &metadata.versions[..]),
            ("live", &["1".to_owned()][..])
        );
        assert_eq!(metadata.properties["digest"], "d1");
        assert!(metadata.properties["preprocessing"].contains("\"mean\":[0.5,0.5,0.5]"));
        let shape = |tensors: &[TensorMetadata], index: usize| tensors[index].shape.clone();
        assert_eq!(shape(&metadata.inputs, 0), [-1, 1]);
        assert_eq!(shape(&metadata.inputs, 1), [-1, 3, 4, 4]);
        assert_eq!(shape(&metadata.outputs, 0), [-1, 2]);
        let config = config("live".to_owned(), &view, 64).unwrap();
        assert_eq!((config.max_batch_size, &config.instance_group[..]), (64, &[][..]));
        for (input, tensor) in config.input.iter().zip(&metadata.inputs) {
            assert_eq!(input.name, tensor.name);
            assert_eq!(input.dims[..], tensor.shape[1..]);
        }
    }

    #[test]
    fn an_index_tells_why_a_model_is_not_ready() {
        let failed = ModelState::Failed(Arc::new(Error::internal("secret")));
        for (state, expected) in [
            (ModelState::Stored, "unloaded"),
            (ModelState::Loading, ""),
            (failed, "internal error"),
        ] {
            let index = index(&view(state));
            assert!(index.reason.starts_with(expected) && !index.reason.contains("secret"));
            assert_ne!(index.state, "READY");
        }
    }

    #[test]
    fn versions_are_the_one_or_nothing() {
        let id = ModelId::parse("m", "model").unwrap();
        assert!(check_version(&id, "").is_ok() && check_version(&id, "1").is_ok());
        let error = check_version(&id, "2").unwrap_err();
        assert_eq!(error.to_string(), "version `m/2` does not exist");
    }
}
