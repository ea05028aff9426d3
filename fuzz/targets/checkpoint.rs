//! See `vitq::fuzzing::checkpoint`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::checkpoint(bytes));
