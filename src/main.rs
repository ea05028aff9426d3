//! The `vitq` binary; everything lives in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vitq::cli::main()
}
