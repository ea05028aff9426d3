//! Artifacts of every schema version stay readable and keep their meaning.

use std::path::PathBuf;

use tch::{Device, Tensor};
use vitq::Error;
use vitq::artifact::Artifact;
use vitq::artifact::format::SCHEMA_VERSION;
use vitq::engine::QuantizedModel;
use vitq::exec::Backend;
use vitq::tensor::sqnr_db;

use crate::reference::{logits, root};

/// On the processor that wrote the logits they are equal; elsewhere a rounding boundary may be met.
const FLOOR_DB: f64 = 25.0;

fn fixture(path: &str) -> PathBuf {
    root("tests/fixtures").join(path)
}

fn tensor(path: &str, name: &str) -> Tensor {
    let tensors = Tensor::read_safetensors(fixture(path)).unwrap();
    tensors.into_iter().find(|(found, _)| found == name).unwrap().1
}

#[test]
fn every_version_is_readable_and_gives_its_logits() {
    for version in 1..=SCHEMA_VERSION {
        let bytes =
            std::fs::read(fixture(&format!("artifacts/schema-{version}.safetensors"))).unwrap();
        let artifact = Artifact::from_bytes("fixture", &bytes).unwrap();
        let logits = logits(&artifact, &tensor("float/vit_b/io.safetensors", "input"));
        let expected = tensor(&format!("artifacts/schema-{version}-logits.safetensors"), "logits");
        let fidelity = sqnr_db(&expected, &logits).unwrap();
        assert!(fidelity >= FLOOR_DB, "schema {version}: {fidelity} dB");
    }
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let bytes = std::fs::read(fixture("artifacts/schema-1.safetensors")).unwrap();
    let artifact = Artifact::from_bytes("fixture", &bytes).unwrap();
    for end in ["_scale", ".bias"] {
        let mut broken = artifact.clone();
        let mut tensors = broken.tensors.iter_mut();
        let (name, tensor) = tensors.find(|(name, _)| name.ends_with(end)).unwrap();
        tensor.data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let name = name.clone();
        let refused = QuantizedModel::load(&broken, Device::Cpu, Backend::Simulated).err();
        assert!(matches!(refused, Some(Error::CorruptArtifact { .. })), "{name}: {refused:?}");
    }
}

#[test]
fn the_first_version_is_written_as_it_was() {
    // Reading and writing again gives the same file while 1 is the newest version.
    let bytes = std::fs::read(fixture("artifacts/schema-1.safetensors")).unwrap();
    let artifact = Artifact::from_bytes("fixture", &bytes).unwrap();
    assert_eq!(SCHEMA_VERSION, 1, "a newer version: let this test read what the older one wrote");
    assert!(artifact.to_bytes().unwrap() == bytes);
}
