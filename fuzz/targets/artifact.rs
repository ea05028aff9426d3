//! See `vitq::fuzzing::artifact`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::artifact(bytes));
