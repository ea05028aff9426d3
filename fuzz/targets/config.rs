//! See `vitq::fuzzing::config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::config(bytes));
