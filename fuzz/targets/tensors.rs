//! See `vitq::fuzzing::tensors`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::tensors(bytes));
