//! What tests ask of a server.

use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{CalibrationDataset, QuantizeRequest};

/// A method on the demo ViT at 4 bits, with so many images of the digits.
pub(crate) fn digits(model: &str, method: &str, images: u32) -> QuantizeRequest {
    QuantizeRequest {
        checkpoint: "digits-vit".to_owned(),
        method: method.to_owned(),
        weight_bits: 4,
        activation_bits: 4,
        calibration: Some(Calibration::Dataset(CalibrationDataset {
            name: "digits/calib".to_owned(),
            count: images,
            files: vec![],
        })),
        model_id: model.to_owned(),
        ..QuantizeRequest::default()
    }
}

/// A calibration of many units, each of some time: `ias` with few steps.
#[allow(dead_code, reason = "for tests that interrupt it")]
pub(crate) fn of_many_units(model: &str) -> QuantizeRequest {
    let options = [("iterations", "12"), ("batch", "8")];
    QuantizeRequest {
        options: options.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..digits(model, "ias", 8)
    }
}
