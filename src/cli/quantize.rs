//! `vitq quantize`: a calibration on a server, watched to its end.

use std::path::PathBuf;

use serde_json::json;

use crate::bench::results::FLOAT_METHOD;
use crate::cli::args;
use crate::cli::client::{MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::follow::{Outcome, Patience, follow, how_to_return};
use crate::cli::output::Output;
use crate::cli::render;
use crate::engine::names::ModelId;
use crate::error::Error;
use crate::grpc::proto::quantization_service_client::QuantizationServiceClient;
use crate::grpc::proto::quantize_request::Calibration;
use crate::grpc::proto::{CalibrationDataset, QuantizeRequest, RoleBits, StemHead};
use crate::quant::{BitWidth, Precision};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Checkpoint: a folder below the server's --checkpoints.
    #[arg(long, value_name = "NAME")]
    checkpoint: String,
    /// Method id, see `vitq methods`.
    #[arg(long, value_name = "ID")]
    method: String,
    #[command(flatten)]
    bits: BitArgs,
    /// Channel groups of the activations: short for --option groups=N.
    #[arg(long, value_name = "N")]
    groups: Option<u32>,
    /// Treatment of the patch embedding and the classifier.
    #[arg(long, value_enum, default_value = "float")]
    stem_head: StemHeadChoice,
    /// Option of the method; repeatable.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = args::key_value)]
    options: Vec<(String, String)>,
    /// Calibration data set: a folder of class folders below the server's --datasets.
    #[arg(long, value_name = "NAME")]
    calib_dataset: String,
    /// Number of calibration images, drawn by the seed.
    #[arg(long, value_name = "N", default_value_t = 32)]
    calib_images: u32,
    /// Text file with exactly the images to use, one path a line, relative to the data set.
    #[arg(long, value_name = "LIST", conflicts_with = "calib_images")]
    calib_files: Option<PathBuf>,
    /// Seed of the choice of images and of everything random in the method.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Id of the new model; made from checkpoint, method and bits if absent.
    #[arg(long, value_name = "MODEL_ID")]
    name: Option<String>,
    /// Free text kept with the model; repeatable.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = args::key_value)]
    labels: Vec<(String, String)>,
    /// Load the model once it is stored, not at its first use.
    #[arg(long)]
    load: bool,
    /// Your id of this request: repeating it returns the same job.
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    request_id: String,
    /// Only check the request.
    #[arg(long)]
    validate_only: bool,
    /// Urgency: jobs with a larger number start first, -100 to 100.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Leave as soon as the server has accepted the job.
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Bit widths: both at once or one by one.
#[derive(Debug, clap::Args)]
struct BitArgs {
    /// Bits of weights and activations, 3 to 8. Every method but float needs them, or the next two.
    #[arg(long, value_name = "N", value_parser = args::bit_width,
        conflicts_with_all = ["weight_bits", "activation_bits"])]
    bits: Option<BitWidth>,
    /// Bits of the weights, or float.
    #[arg(long, value_name = "N", value_parser = args::precision, requires = "activation_bits")]
    weight_bits: Option<Precision>,
    /// Bits of the activations, or float.
    #[arg(long, value_name = "N", value_parser = args::precision, requires = "weight_bits")]
    activation_bits: Option<Precision>,
    /// Quantize the weights alone: activations stay float.
    #[arg(long, requires = "bits", conflicts_with_all = ["weight_bits", "activation_bits"])]
    weights_only: bool,
    /// Bits of one kind of product, before all else: WEIGHTS/ACTIVATIONS, each 3 to 8 or float, or
    /// for query_key and score_value ACTIVATIONS alone; repeatable. `reduction=8/8`, `fc2=4/float`.
    #[arg(long = "role-bits", value_name = "ROLE=W/A")]
    role_bits: Vec<String>,
}

impl BitArgs {
    /// Bits of weights and activations, for this method.
    fn widths(&self, method: &str) -> Result<(Precision, Precision), Failure> {
        // clap has made sure that the two are given together
        match (self.bits, self.weight_bits.zip(self.activation_bits)) {
            (None, Some(both)) => Ok(both),
            (Some(bits), _) if self.weights_only => Ok((Precision::Bits(bits), Precision::Float)),
            (Some(bits), _) => Ok((Precision::Bits(bits), Precision::Bits(bits))),
            (None, None) if method == FLOAT_METHOD => Ok((Precision::Float, Precision::Float)),
            (None, None) => Err(Failure::Usage(
                "--bits, or --weight-bits and --activation-bits, must be given".to_owned(),
            )),
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum StemHeadChoice {
    /// Both stay float.
    Float,
    /// Both at 8 bits.
    Int8,
    /// As every other layer.
    Same,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let (server, patience) = (self.server.clone(), self.patience());
        let request = self.request()?;
        block_on(async move {
            let client = QuantizationServiceClient::new(server.connect().await?)
                .max_decoding_message_size(MAX_ANSWER);
            let events = client.clone().quantize(request).await?.into_inner();
            let again = async |from| Ok(client.clone().watch(from).await?.into_inner());
            match follow(events, again, patience, &server.server).await? {
                Outcome::Validated => {
                    output.result("the request is valid", &json!({ "valid": true }))
                }
                Outcome::Detached(operation) => output.result(
                    format!("{operation}\n{}", how_to_return(&operation, &server.server)),
                    &json!({ "operation": operation }),
                ),
                Outcome::Done { operation, result } => output.result(
                    render::quantized_text(&result),
                    &render::quantized_json(&operation, &result),
                ),
            }
        })
    }

    fn patience(&self) -> Patience {
        if self.detach { Patience::UntilAccepted } else { Patience::ToTheEnd }
    }

    fn request(self) -> Result<QuantizeRequest, Failure> {
        let groups = self.groups.map(|groups| ("groups".to_owned(), groups.to_string()));
        let options = args::unique(self.options.into_iter().chain(groups).collect(), "option")?;
        let (weight_bits, activation_bits) = self.bits.widths(&self.method)?;
        let role_bits = args::role_bits(&self.bits.role_bits)?;
        let files = self.calib_files.as_deref().map(args::list_file).transpose()?;
        let dataset = CalibrationDataset {
            name: self.calib_dataset,
            count: if files.is_some() { 0 } else { self.calib_images },
            files: files.unwrap_or_default(),
        };
        let model_id = match self.name {
            Some(name) => name,
            None => {
                let bits = format!("w{}a{}", weight_bits.get(), activation_bits.get());
                default_id(&[&self.checkpoint, &self.method, &bits, &role_bits.to_string()])?
            }
        };
        let stem_head = match self.stem_head {
            StemHeadChoice::Float => StemHead::Float,
            StemHeadChoice::Int8 => StemHead::Int8,
            StemHeadChoice::Same => StemHead::Same,
        };
        Ok(QuantizeRequest {
            checkpoint: self.checkpoint,
            method: self.method,
            options,
            weight_bits: weight_bits.into(),
            activation_bits: activation_bits.into(),
            stem_head: stem_head.into(),
            seed: self.seed,
            model_id,
            labels: args::unique(self.labels, "label")?,
            load_after: self.load,
            request_id: self.request_id,
            validate_only: self.validate_only,
            priority: self.priority,
            role_bits: role_bits.iter().map(RoleBits::from).collect(),
            calibration: Some(Calibration::Dataset(dataset)),
        })
    }
}

/// `digits-vit-ubb-w4a4` of a checkpoint's path, method, bits and exceptions, with what an id must
/// not hold replaced by hyphens; refused where that is no id.
fn default_id(parts: &[&str; 4]) -> Result<String, Failure> {
    let [checkpoint, rest @ ..] = parts;
    let name = checkpoint.rsplit('/').next().unwrap_or(checkpoint);
    let text = format!("{name}-{}", rest.join("-")).to_lowercase();
    let allowed = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let id = text.chars().map(allowed).collect::<String>().trim_matches('-').to_owned();
    let refused = |error: Error| {
        format!("{error}: it was made of checkpoint, method and bits, give another one")
    };
    ModelId::parse(&id, "--name").map_err(|error| Failure::Usage(refused(error)))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_id_tells_checkpoint_method_and_bits() {
        let id = |parts| default_id(parts).unwrap();
        assert_eq!(id(&["digits-vit", "ubb", "w4a4", ""]), "digits-vit-ubb-w4a4");
        let parts = ["_a/ViT_Tiny.p16", "ubb", "w4a32", "reduction=8/8 head=8/float"];
        assert_eq!(id(&parts), "vit-tiny-p16-ubb-w4a32-reduction-8-8-head-8-float");
        let Err(Failure::Usage(reason)) = default_id(&[&"x".repeat(60), "ubb", "w4a4", ""]) else {
            panic!("longer than an id");
        };
        assert!(reason.starts_with("--name: ") && reason.contains("give another"), "{reason}");
    }
}
