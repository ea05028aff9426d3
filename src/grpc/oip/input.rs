//! From the tensors of a request to images.

use bytes::Bytes;

use super::parameters::refuse_shared_memory;
use super::tensors::{DataType, Elements, element_count};
use crate::engine::classify::ImageInput;
use crate::error::{Error, Result};
use crate::grpc::proto::inference::InferTensorContents;
use crate::grpc::proto::inference::model_infer_request::InferInputTensor;

/// The input that takes encoded images.
pub(super) const IMAGE: &str = "image";
/// The input that takes normalised pixels.
pub(super) const PIXELS: &str = "pixels";

/// How elements are carried: answers have the form of their requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As bytes beside the tensors.
    Raw,
    /// As typed contents of the tensors.
    Contents,
}

/// The images of a request.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) images: Vec<ImageInput>,
    /// What an image is called in errors: `image[3]`.
    pub(super) field: fn(usize) -> String,
    pub(super) form: Form,
}

/// What a model takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepted {
    /// Side of its images in pixels.
    pub(super) side: i64,
    /// Most images of one call.
    pub(super) images: usize,
}

impl Input {
    /// Reads the request's one input: `image`, BYTES [n, 1] or [n]; or `pixels`, FP32
    /// [n, 3, side, side].
    ///
    /// # Errors
    /// `InvalidArgument` on the part at fault.
    pub(super) fn read(
        inputs: Vec<InferInputTensor>,
        raw: Vec<Bytes>,
        accepted: Accepted,
    ) -> Result<Self> {
        let form = form(&inputs, &raw)?;
        let Ok([input]) = <[InferInputTensor; 1]>::try_from(inputs) else {
            let reason = format!("exactly one of `{IMAGE}` and `{PIXELS}` is needed");
            return Err(Error::invalid("inputs", reason));
        };
        let InferInputTensor { name, datatype, shape, parameters, contents } = input;
        refuse_shared_memory(&parameters, "inputs[0].parameters")?;
        let Accepted { side, images: most } = accepted;
        let (kind, tail, field): (_, &[i64], fn(usize) -> String) = match name.as_str() {
            // As advertised; [n] is what one would write by hand.
            IMAGE if shape.len() == 2 => (DataType::Bytes, &[1], |index| format!("image[{index}]")),
            IMAGE => (DataType::Bytes, &[], |index| format!("image[{index}]")),
            PIXELS => (DataType::Fp32, &[3, side, side], |index| format!("pixels[{index}]")),
            _ => {
                let reason = format!("must be `{IMAGE}` or `{PIXELS}`");
                return Err(Error::invalid("inputs[0].name", reason));
            }
        };
        if datatype != kind.name() {
            let reason = format!("`{name}` has {}", kind.name());
            return Err(Error::invalid("inputs[0].datatype", reason));
        }
        check_shape(&shape, tail, most)?;
        let count = element_count(&shape, "inputs[0].shape")?;
        let elements = match (raw.first(), contents) {
            (Some(raw), _) => Elements::from_raw(kind, count, raw, "raw_input_contents[0]")?,
            (None, Some(contents)) => of_contents(kind, count, contents)?,
            (None, None) => return Err(Error::invalid("inputs[0].contents", "is missing")),
        };
        Ok(Self { images: images(elements, count, tail)?, field, form })
    }
}

/// Raw for all inputs or for none.
fn form(inputs: &[InferInputTensor], raw: &[Bytes]) -> Result<Form> {
    if raw.is_empty() {
        return Ok(Form::Contents);
    }
    if let Some(index) = inputs.iter().position(|input| input.contents.is_some()) {
        let reason = "must be absent, because the request has raw_input_contents";
        return Err(Error::invalid(format!("inputs[{index}].contents"), reason));
    }
    if raw.len() != inputs.len() {
        let reason = format!("{} entries for {} inputs", raw.len(), inputs.len());
        return Err(Error::invalid("raw_input_contents", reason));
    }
    Ok(Form::Raw)
}

/// As many images as fit, of the model's size.
fn check_shape(shape: &[i64], tail: &[i64], most: usize) -> Result<()> {
    let refused = |reason: String| Err(Error::invalid("inputs[0].shape", reason));
    let Some((&images, _)) = shape.split_first().filter(|(_, rest)| *rest == tail) else {
        let tail: String = tail.iter().map(|size| format!(", {size}")).collect();
        return refused(format!("must be [images{tail}], not {shape:?}"));
    };
    match usize::try_from(images) {
        Ok(0) | Err(_) => refused(format!("{images} images, at least one is needed")),
        Ok(images) if images > most => {
            refused(format!("{images} images in one call, at most {most} fit"))
        }
        Ok(_) => Ok(()),
    }
}

fn of_contents(kind: DataType, count: usize, contents: InferTensorContents) -> Result<Elements> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let foreign = bool_contents.len()
        + int_contents.len()
        + int64_contents.len()
        + uint_contents.len()
        + uint64_contents.len()
        + fp64_contents.len();
    let (elements, found, foreign) = match kind {
        DataType::Bytes => {
            let found = bytes_contents.len();
            (Elements::Bytes(bytes_contents), found, foreign + fp32_contents.len())
        }
        DataType::Fp32 => {
            let found = fp32_contents.len();
            (Elements::Fp32(fp32_contents), found, foreign + bytes_contents.len())
        }
    };
    let refused = |reason: String| Err(Error::invalid("inputs[0].contents", reason));
    if foreign > 0 {
        return refused(format!("has elements that are not {}", kind.name()));
    }
    if found != count {
        return refused(format!("{found} elements, the shape has {count}"));
    }
    Ok(elements)
}

fn images(elements: Elements, count: usize, tail: &[i64]) -> Result<Vec<ImageInput>> {
    match elements {
        Elements::Bytes(files) => Ok(files.into_iter().map(ImageInput::Encoded).collect()),
        Elements::Fp32(values) => {
            let size = element_count(tail, "inputs[0].shape")?.clamp(1, count.max(1));
            let image = |(index, values): (usize, &[f32])| {
                if values.iter().all(|value| value.is_finite()) {
                    return Ok(ImageInput::Pixels(values.to_vec()));
                }
                Err(Error::invalid(format!("{PIXELS}[{index}]"), "has values that are not finite"))
            };
            values.chunks(size).enumerate().map(image).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCEPTED: Accepted = Accepted { side: 2, images: 4 };

    fn tensor(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
        InferInputTensor {
            name: name.to_owned(),
            datatype: datatype.to_owned(),
            shape: shape.to_vec(),
            ..InferInputTensor::default()
        }
    }

    fn raw(tensor: InferInputTensor, content: &[u8]) -> Result<Input> {
        Input::read(vec![tensor], vec![Bytes::copy_from_slice(content)], ACCEPTED)
    }

    fn field(result: Result<Input>) -> String {
        let error = result.unwrap_err();
        let Error::InvalidArgument { field, .. } = error else { panic!("{error}") };
        field
    }

    fn floats(count: u8) -> Vec<u8> {
        (0..count).flat_map(|value| f32::from(value).to_le_bytes()).collect()
    }

    #[test]
    fn encoded_images_come_with_and_without_a_second_dimension() {
        for shape in [&[2][..], &[2, 1]] {
            let content = b"\x01\0\0\0a\x02\0\0\0bc";
            let input = raw(tensor("image", "BYTES", shape), content).unwrap();
            let files: Vec<_> = input.images.iter().map(|image| format!("{image:?}")).collect();
            assert_eq!(files, ["Encoded(b\"a\")", "Encoded(b\"bc\")"]);
            assert_eq!((input.form, (input.field)(1)), (Form::Raw, "image[1]".to_owned()));
        }
    }

    #[test]
    fn pixels_are_cut_into_images() {
        let input = raw(tensor("pixels", "FP32", &[2, 3, 2, 2]), &floats(24)).unwrap();
        let [ImageInput::Pixels(first), ImageInput::Pixels(second)] = &input.images[..] else {
            panic!("{input:?}")
        };
        assert_eq!((first[0], first[11], second[0], second[11]), (0.0, 11.0, 12.0, 23.0));
        assert_eq!((input.field)(0), "pixels[0]");
    }

    #[test]
    fn contents_are_read_where_nothing_is_raw() {
        let mut image = tensor("image", "BYTES", &[1]);
        let bytes_contents = vec![Bytes::from_static(b"a")];
        let contents = InferTensorContents { bytes_contents, ..Default::default() };
        image.contents = Some(contents.clone());
        let input = Input::read(vec![image.clone()], vec![], ACCEPTED).unwrap();
        assert_eq!((input.form, input.images.len()), (Form::Contents, 1));

        assert_eq!(field(raw(image.clone(), b"\x01\0\0\0a")), "inputs[0].contents");
        image.shape = vec![2];
        assert_eq!(field(Input::read(vec![image], vec![], ACCEPTED)), "inputs[0].contents");
        let mut pixels = tensor("pixels", "FP32", &[1, 3, 2, 2]);
        for contents in [
            None,
            Some(contents),
            Some(InferTensorContents { fp64_contents: vec![0.0; 12], ..Default::default() }),
        ] {
            pixels.contents = contents;
            let result = Input::read(vec![pixels.clone()], vec![], ACCEPTED);
            assert_eq!(field(result), "inputs[0].contents");
        }
    }

    #[test]
    fn every_part_of_an_unusable_input_is_named() {
        let infinite = [floats(11), f32::INFINITY.to_le_bytes().to_vec()].concat();
        for (name, datatype, shape, content, expected) in [
            ("images", "BYTES", &[1][..], &b"\0\0\0\0"[..], "inputs[0].name"),
            ("image", "FP32", &[1], b"\0\0\0\0", "inputs[0].datatype"),
            ("pixels", "FP64", &[1, 3, 2, 2], b"", "inputs[0].datatype"),
            ("image", "BYTES", &[], b"\0\0\0\0", "inputs[0].shape"),
            ("image", "BYTES", &[0], b"", "inputs[0].shape"),
            ("image", "BYTES", &[-1], b"", "inputs[0].shape"),
            ("image", "BYTES", &[5], b"", "inputs[0].shape"),
            ("image", "BYTES", &[i64::MAX], b"", "inputs[0].shape"),
            ("image", "BYTES", &[1, 2], b"", "inputs[0].shape"),
            ("pixels", "FP32", &[1, 3, 2, 3], b"", "inputs[0].shape"),
            ("pixels", "FP32", &[3, 2, 2], b"", "inputs[0].shape"),
            ("image", "BYTES", &[2], b"\0\0\0\0", "raw_input_contents[0]"),
            ("pixels", "FP32", &[1, 3, 2, 2], &floats(11), "raw_input_contents[0]"),
            ("pixels", "FP32", &[1, 3, 2, 2], &infinite, "pixels[0]"),
        ] {
            let result = raw(tensor(name, datatype, shape), content);
            assert_eq!(field(result), expected, "{name} {datatype} {shape:?}");
        }
        let image = tensor("image", "BYTES", &[1]);
        let content = Bytes::from_static(b"\0\0\0\0");
        let none = Input::read(vec![], vec![], ACCEPTED);
        assert_eq!(field(none), "inputs");
        let both = Input::read(vec![image.clone(); 2], vec![content.clone(); 2], ACCEPTED);
        assert_eq!(field(both), "inputs");
        let uneven = Input::read(vec![image], vec![content; 2], ACCEPTED);
        assert_eq!(field(uneven), "raw_input_contents");
    }
}
