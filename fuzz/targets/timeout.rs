//! See `vitq::fuzzing::timeout`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::timeout(bytes));
