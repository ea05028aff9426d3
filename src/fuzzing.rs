//! Entry points of the fuzzer, one per place where bytes from outside are taken apart.
//!
//! They reach behind the public API on purpose: past the panic guard of the image decoders, which
//! would hide what is sought, and past the digest of artifacts, which no mutation survives. `fuzz/`
//! runs them under libFuzzer, `tests/numerics/fuzz_corpus.rs` on what it has found. Not part of the API.

use std::ffi::OsString;
use std::io::Write;

use bytes::Bytes;
use clap::{Args, Command, FromArgMatches, Parser};
use tch::Device;

use crate::artifact::Artifact;
use crate::config::{self, Origin, ServeConfig};
use crate::data::{DecodeLimits, decode_by_content, preprocess};
use crate::engine::QuantizedModel;
use crate::exec::Backend;
use crate::grpc::deadline;
use crate::grpc::oip::tensors::{DataType, Elements, element_count};
use crate::grpc::page::PageRequest;
use crate::grpc::security::Security;
use crate::model::{Checkpoint, Interpolation, Preprocessing};
use crate::{calib, device};

/// An entry point: what is wrong panics.
pub type Target = fn(&[u8]);

/// All entry points by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("image", image),
    ("artifact", artifact),
    ("checkpoint", checkpoint),
    ("tensors", tensors),
    ("page_token", page_token),
    ("timeout", timeout),
    ("config", config),
    ("config_file", config_file),
];

/// An image file: decoded within its limits, or refused; and resized.
pub fn image(bytes: &[u8]) {
    let limits = DecodeLimits { max_bytes: 1 << 16, max_side: 2_048, max_pixels: 1 << 18 };
    let Ok(image) = decode_by_content(bytes, &limits) else { return };
    let (width, height) = (image.width as usize, image.height as usize);
    assert_eq!(image.pixels.len(), 3 * width * height, "pixels are missing");
    assert!(bytes.len() <= limits.max_bytes && width * height <= 1 << 18, "beyond the limits");
    assert!((1..=2_048).contains(&width.min(height)) && width.max(height) <= 2_048);
    let spec = Preprocessing {
        image_size: 8,
        crop_pct: 0.9,
        interpolation: Interpolation::Bicubic,
        mean: [0.5; 3],
        std: [0.5; 3],
    };
    let pixels = preprocess(&image, &spec).expect("every image can be resized");
    assert_eq!(pixels.len(), 3 * 8 * 8);
    assert!(pixels.iter().all(|value| (-1.0..=1.0).contains(value)), "outside of the range");
}

/// An artifact: opened as a model, or refused. Its digest is taken for right.
pub fn artifact(bytes: &[u8]) {
    let verified = Artifact::from_bytes("fuzz", bytes);
    let Ok(artifact) = Artifact::from_unverified("fuzz", bytes) else {
        assert!(verified.is_err(), "the digest cannot make up for the rest");
        return;
    };
    if let Ok(model) = QuantizedModel::load(&artifact, Device::Cpu, Backend::Simulated) {
        assert!(model.resident_bytes() > 0);
        let again = artifact.to_bytes().expect("what was read can be written");
        let again = Artifact::from_bytes("fuzz", &again).expect("what was written can be read");
        assert_eq!(
            (again.header.packed.len(), again.tensors),
            (artifact.header.packed.len(), artifact.tensors,)
        );
    }
}

/// A checkpoint: the length of its `config.json` in two bytes, the config, the safetensors file.
pub fn checkpoint(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let length = usize::from(u16::from_le_bytes(*length));
    let Some((config, model)) = rest.split_at_checked(length) else { return };
    if let Ok(checkpoint) = Checkpoint::from_bytes(config, model) {
        assert_eq!(checkpoint.bytes, model.len() as u64);
        Checkpoint::check_config(config).expect("the config of a checkpoint");
        crate::model::Model::build(&checkpoint.spec, &checkpoint.weights)
            .expect("what was checked can be built");
    }
}

/// A raw tensor of the inference protocol: its type and number of axes in one byte, its axes as numbers
/// of eight bytes, and the elements.
pub fn tensors(bytes: &[u8]) {
    let Some((&[head], mut rest)) = bytes.split_first_chunk() else { return };
    let kind = if head & 1 == 0 { DataType::Bytes } else { DataType::Fp32 };
    let mut shape = Vec::new();
    for _ in 0..(head >> 1) % 5 {
        let Some((axis, after)) = rest.split_first_chunk() else { return };
        shape.push(i64::from_le_bytes(*axis));
        rest = after;
    }
    let Ok(count) = element_count(&shape, "shape") else { return };
    let raw = Bytes::copy_from_slice(rest);
    let Ok(elements) = Elements::from_raw(kind, count, &raw, "raw") else { return };
    let found = match &elements {
        Elements::Bytes(elements) => elements.len(),
        Elements::Fp32(values) => values.len(),
    };
    assert_eq!(found, count);
    assert_eq!(elements.to_raw().expect("what was read can be written"), raw);
}

/// A page token: refused, or read back from the token that it leads to.
pub fn page_token(bytes: &[u8]) {
    let Ok(token) = std::str::from_utf8(bytes) else { return };
    let Ok(page) = PageRequest::parse("models".to_owned(), 1, token) else { return };
    let Some(after) = page.after.clone() else {
        assert!(token.is_empty(), "a token that says nothing");
        return;
    };
    let next = page.cut(&mut vec![(), ()], |()| after.clone());
    let again = PageRequest::parse("models".to_owned(), 1, &next).expect("our own token");
    assert_eq!(again, page);
    assert!(PageRequest::parse("operations".to_owned(), 1, token).is_err(), "of another list");
}

/// A grpc-timeout: as a plain reading of the specification has it.
pub fn timeout(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let nanoseconds = text.char_indices().next_back().and_then(|(at, unit)| {
        let unit: u128 = match unit {
            'H' => 3_600_000_000_000,
            'M' => 60_000_000_000,
            'S' => 1_000_000_000,
            'm' => 1_000_000,
            'u' => 1_000,
            'n' => 1,
            _ => return None,
        };
        let digits = &text[..at];
        let plain = (1..=8).contains(&digits.len()) && digits.chars().all(|c| c.is_ascii_digit());
        plain.then(|| digits.parse::<u128>().expect("eight digits") * unit)
    });
    assert_eq!(deadline::parse(text).map(|limit| limit.as_nanos()), nanoseconds);
}

/// The flags of `vitq serve`, one argument a line, and what is made of their values.
pub fn config(bytes: &[u8]) {
    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        serve: ServeConfig,
    }

    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for line in text.lines() {
        let mut bits = calib::RoleBits::default();
        if bits.insert_text(line).is_ok() {
            let mut again = calib::RoleBits::default();
            again.insert_text(&bits.to_string()).expect("what is shown can be read");
            assert_eq!(again, bits);
        }
    }
    let arguments = std::iter::once("serve").chain(text.lines());
    let Ok(Command { serve }) = Command::try_parse_from(arguments) else { return };
    let _ = device::parse_list(&serve.process.device); // refused or not, but in order
    let (engine, server) = (serve.engine(Vec::new()), serve.server(Security::default()));
    assert!(engine.queue.images > 0 && engine.queue.bytes > 0 && engine.batching.max_batch > 0);
    assert!(engine.memory_budget != Some(0) && server.max_message_bytes > 0);
    if let Some(url) = &engine.database {
        assert!(url.len() < 8 || !format!("{serve:?}").contains(url.as_str()), "a secret is shown");
    }
}

/// A configuration file of `vitq serve`: refused, or worth as much as its keys as flags.
pub fn config_file(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary folder");
    file.write_all(bytes).expect("a temporary file");
    let command = Command::new("vitq").subcommand(ServeConfig::augment_args(Command::new("serve")));
    let arguments = ["vitq", "serve", "--config"].map(OsString::from);
    let arguments = [&arguments[..], &[file.path().into()]].concat();
    let parsed = config::parse(&command, &arguments, &[]).ok();
    let parsed = parsed.filter(|parsed| parsed.settings.mistakes.is_empty());
    let Ok(text) = std::str::from_utf8(bytes) else {
        assert!(parsed.is_none(), "not text");
        return;
    };
    let Some(parsed) = parsed else { return };
    let content: toml::Table = text.parse().expect("what was taken is TOML");
    for setting in &parsed.settings.list {
        let from_file = setting.origin == Origin::File;
        assert_eq!(from_file, content.contains_key(&setting.key), "{}", setting.key);
    }
    let (_, serve) = parsed.matches.subcommand().expect("the command");
    ServeConfig::from_arg_matches(serve).expect("what was parsed can be read");
}
