//! See `vitq::fuzzing::config_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::config_file(bytes));
