//! See `vitq::fuzzing::image`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vitq::fuzzing::image(bytes));
