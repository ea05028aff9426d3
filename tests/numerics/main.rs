//! What comes out of the models: parity with timm and with the authors' code, laws of every method, and
//! files that were written before.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the measured figures are shown with --nocapture")]

mod digits;
mod methods;
#[path = "../support/reference.rs"]
mod reference;

mod artifact_versions;
mod bench;
mod emulated;
mod float_parity;
mod fuzz_corpus;
mod ias_reference;
mod igq;
mod integer;
mod method_laws;
mod mixed_plans;
mod preprocess_parity;
mod ptq4vit_reference;
mod repq_reference;
mod ubb_platform;
