//! From logits to the tensors of an answer.

use bytes::Bytes;

use super::input::Form;
use super::parameters::{number, refuse_shared_memory};
use super::tensors::{DataType, Elements};
use crate::engine::classify::softmax;
use crate::engine::evaluator::top_k;
use crate::error::{Error, Result};
use crate::grpc::proto::inference::InferTensorContents;
use crate::grpc::proto::inference::model_infer_request::InferRequestedOutputTensor;
use crate::grpc::proto::inference::model_infer_response::InferOutputTensor;
use crate::model::ModelSpec;

/// A tensor that a model gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Raw model outputs.
    Logits,
    /// Their softmax.
    Probabilities,
}

/// All of them.
pub(super) const SOURCES: [Source; 2] = [Source::Logits, Source::Probabilities];

impl Source {
    /// The tensor's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Logits => "logits",
            Self::Probabilities => "probabilities",
        }
    }

    fn values(self, logits: &[f32]) -> Vec<f32> {
        match self {
            Self::Logits => logits.to_vec(),
            Self::Probabilities => softmax(logits),
        }
    }
}

/// A tensor that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Output {
    source: Source,
    /// So many best classes as text, instead of all values.
    classes: Option<usize>,
}

impl Output {
    /// Reads the outputs of a request; none means all.
    ///
    /// # Errors
    /// `InvalidArgument` on the part at fault.
    pub(super) fn read(requested: Vec<InferRequestedOutputTensor>) -> Result<Vec<Self>> {
        if requested.is_empty() {
            return Ok(SOURCES.map(|source| Self { source, classes: None }).to_vec());
        }
        let mut outputs = Vec::<Self>::new();
        for (index, output) in requested.into_iter().enumerate() {
            let InferRequestedOutputTensor { name, parameters } = output;
            let refused =
                |reason: &str| Err(Error::invalid(format!("outputs[{index}].name"), reason));
            let Some(source) = SOURCES.into_iter().find(|source| source.name() == name) else {
                return refused("must be `logits` or `probabilities`");
            };
            // This bounds their number, too.
            if outputs.iter().any(|output| output.source == source) {
                return refused("is there twice");
            }
            let within = format!("outputs[{index}].parameters");
            refuse_shared_memory(&parameters, &within)?;
            let classes = number(&parameters, "classification", &within)?.filter(|n| *n > 0);
            let classes = classes.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
            outputs.push(Self { source, classes });
        }
        Ok(outputs)
    }

    /// The tensor for these images' logits: FP32 [images, classes], or BYTES [images, best].
    fn elements(&self, images: &[Vec<f32>], spec: &ModelSpec) -> (DataType, Elements) {
        let Self { source, classes } = *self;
        match classes {
            None => {
                let values = images.iter().flat_map(|logits| source.values(logits));
                (DataType::Fp32, Elements::Fp32(values.collect()))
            }
            Some(count) => {
                let best = images.iter().flat_map(|logits| {
                    let values = source.values(logits);
                    // By the logits: two probabilities may round to the same number.
                    let best = top_k(logits, count).into_iter();
                    best.map(move |class| classification(values[class], class, spec))
                });
                (DataType::Bytes, Elements::Bytes(best.collect()))
            }
        }
    }
}

/// `value:index`, and `:label` if the model has labels.
fn classification(value: f32, class: usize, spec: &ModelSpec) -> Bytes {
    match spec.labels.get(class) {
        Some(label) => format!("{value}:{class}:{label}").into(),
        None => format!("{value}:{class}").into(),
    }
}

/// The tensors of an answer, and their raw contents if that is its form.
///
/// # Errors
/// `Internal` when a label has 4 GiB.
pub(super) fn tensors(
    outputs: &[Output],
    images: &[Vec<f32>],
    spec: &ModelSpec,
    form: Form,
) -> Result<(Vec<InferOutputTensor>, Vec<Bytes>)> {
    let (mut tensors, mut raw) = (Vec::new(), Vec::new());
    for output in outputs {
        let (kind, elements) = output.elements(images, spec);
        let count = match &elements {
            Elements::Bytes(strings) => strings.len(),
            Elements::Fp32(values) => values.len(),
        };
        let shape = [images.len(), count / images.len().max(1)];
        let mut tensor = InferOutputTensor {
            name: output.source.name().to_owned(),
            datatype: kind.name().to_owned(),
            shape: shape.iter().map(|size| i64::try_from(*size).unwrap_or(i64::MAX)).collect(),
            ..InferOutputTensor::default()
        };
        match form {
            Form::Raw => raw.push(elements.to_raw()?),
            Form::Contents => tensor.contents = Some(contents(elements)),
        }
        tensors.push(tensor);
    }
    Ok((tensors, raw))
}

fn contents(elements: Elements) -> InferTensorContents {
    let none = InferTensorContents::default();
    match elements {
        Elements::Bytes(bytes_contents) => InferTensorContents { bytes_contents, ..none },
        Elements::Fp32(fp32_contents) => InferTensorContents { fp32_contents, ..none },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::example_record;
    use crate::grpc::proto::inference::InferParameter;
    use crate::grpc::proto::inference::infer_parameter::ParameterChoice;

    fn requested(name: &str, classification: Option<i64>) -> InferRequestedOutputTensor {
        let parameter =
            |count| InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(count)) };
        InferRequestedOutputTensor {
            name: name.to_owned(),
            parameters: classification
                .map(|count| ("classification".to_owned(), parameter(count)))
                .into_iter()
                .collect(),
        }
    }

    #[test]
    fn all_outputs_have_the_requests_form() {
        let spec = example_record("m", "d").model;
        let images = [vec![0.0, 0.0], vec![1.0, 1.0]];
        let all = Output::read(vec![]).unwrap();
        let (tensors_raw, raw) = tensors(&all, &images, &spec, Form::Raw).unwrap();
        let names: Vec<_> = tensors_raw.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["logits", "probabilities"]);
        assert!(tensors_raw.iter().all(|t| t.shape == [2, 2] && t.contents.is_none()));
        assert_eq!(raw[1].chunks(4).next().unwrap(), 0.5_f32.to_le_bytes());
        let (typed, raw) = tensors(&all, &images, &spec, Form::Contents).unwrap();
        assert!(raw.is_empty());
        assert_eq!(typed[0].contents.as_ref().unwrap().fp32_contents, [0.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn classes_are_ranked_with_their_labels() {
        let mut spec = example_record("m", "d").model;
        let asked = vec![requested("probabilities", Some(9)), requested("logits", Some(1))];
        let outputs = Output::read(asked).unwrap();
        let images = [vec![0.0, 3_f32.ln()], vec![2.5, -1.0]];
        let texts = |spec: &ModelSpec| -> Vec<Vec<Bytes>> {
            let (tensors, _) = tensors(&outputs, &images, spec, Form::Contents).unwrap();
            assert_eq!((&tensors[0].shape[..], &tensors[1].shape[..]), (&[2, 2][..], &[2, 1][..]));
            assert!(tensors.iter().all(|tensor| tensor.datatype == "BYTES"));
            tensors.into_iter().map(|t| t.contents.unwrap().bytes_contents).collect()
        };
        let [probabilities, logits] = &texts(&spec)[..] else { panic!() };
        assert_eq!(probabilities[..2], ["0.75:1:yes", "0.25:0:no"]);
        assert_eq!(logits[1], "2.5:0:no");
        spec.labels.clear();
        assert_eq!(texts(&spec)[1][1], "2.5:0");
    }

    #[test]
    fn unusable_outputs_are_named() {
        for (outputs, expected) in [
            (vec![requested("scores", None)], "outputs[0].name"),
            (vec![requested("logits", None), requested("logits", Some(1))], "outputs[1].name"),
            (vec![requested("logits", Some(-1))], "outputs[0].parameters.classification"),
        ] {
            let error = Output::read(outputs).unwrap_err();
            let Error::InvalidArgument { field, .. } = error else { panic!("{error}") };
            assert_eq!(field, expected);
        }
        assert_eq!(Output::read(vec![requested("logits", Some(0))]).unwrap()[0].classes, None);
    }
}
