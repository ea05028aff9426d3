//! Makes the binary find libtorch without environment variables, and compiles proto/ without protoc.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use protox::prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // The rpath must be absolute: the binary may be started from anywhere.
    if let Some(libtorch) = env::var_os("LIBTORCH") {
        let lib = Path::new(&libtorch).join("lib");
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
    println!("cargo:rustc-env=BUILT_WITH_LIBTORCH={}", libtorch_version().unwrap_or_default());
    compile_protos()
}

/// What libtorch's own Python module says that it is, as `2.11.0+cpu`.
fn libtorch_version() -> Option<String> {
    let file = Path::new(&env::var_os("LIBTORCH")?).join("version.py");
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim_matches('\'').to_owned())
}

fn compile_protos() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut files = vec![PathBuf::from("google/longrunning/operations.proto")];
    for folder in ["inference", "vitq/v1"] {
        for entry in fs::read_dir(Path::new("proto").join(folder))? {
            files.push(Path::new(folder).join(entry?.file_name()));
        }
    }
    files.sort();
    let descriptors = protox::compile(files, ["proto"])?;
    // Reflection serves every file, imports included.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    // `Any` needs the full names of what it holds.
    config.enable_type_names().type_name_domain(["."], "type.googleapis.com");
    tonic_prost_build::configure()
        .include_file("proto.rs")
        .extern_path(".google.rpc", "::tonic_types::pb")
        .bytes(".inference.InferTensorContents.bytes_contents")
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents")
        .bytes(".vitq.v1.Image.content")
        .bytes(".vitq.v1.UploadImage.content")
        .bytes(".vitq.v1.UploadRequest.chunk")
        .btree_map(".inference")
        .btree_map(".vitq.v1")
        // Foreign comments hold indented text that rustdoc would take for tests.
        .disable_comments([".google"])
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
