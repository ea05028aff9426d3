//! See `vitq::fuzzing::page_token`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::page_token(bytes));
