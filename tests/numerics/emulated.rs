//! The CUDA kernels without a GPU: compiled as C++ beside an emulator of what they are made of
//! (`emulated/emulator.h` says what it emulates), and compared with plain references.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// Orders in which threads take turns.
const ORDERS: [&str; 3] = ["ascending", "descending", "shuffled"];

/// The quickest to compile and run, products and sums rounded one by one, and memory read as any type,
/// as kernels do.
const FLAGS: [&str; 4] = ["-std=c++20", "-Og", "-ffp-contract=off", "-fno-strict-aliasing"];

fn expect_success(what: &str, output: &Output) {
    let [printed, complaints] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{what}: {}\n{printed}{complaints}", output.status);
}

/// Runs the cases of `emulated/NAME.cpp`.
fn check(name: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = TempDir::new().unwrap();
    let program = folder.path().join(name);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut words = compiler.split_whitespace();
    let compiled = Command::new(words.next().unwrap())
        .args(words)
        .args(FLAGS)
        .arg("-I")
        .arg(root.join("src/kernels/cuda"))
        .arg(root.join("tests/numerics/emulated").join(format!("{name}.cpp")))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    expect_success(&compiler, &compiled);
    for order in ORDERS {
        let ran = Command::new(&program).arg(order).output().unwrap();
        expect_success(&format!("{name}, threads {order}"), &ran);
    }
}

#[test]
fn products_are_those_of_whole_numbers() {
    check("products");
}

#[test]
fn heads_are_on_the_grids_of_their_tokens() {
    check("heads");
}

#[test]
fn attention_is_that_of_double_precision() {
    check("attention");
}

#[test]
fn weights_on_stairs_are_those_of_one_kernel_after_another() {
    check("softmax");
}

#[test]
fn rows_are_those_of_double_precision() {
    check("rows");
}
