//! Our Python client (clients/python) against the real program, in the clear and over TLS.
//! `scripts/setup.sh test` installs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use vitq::grpc::auth::{NewToken, Scopes, new_token};

use crate::program::{Process, Program, Stores};
use crate::{root, rust_example};

/// Python with the client, at work in a folder.
fn python(folder: &Path) -> Command {
    let python = root().join(".venv-clients/bin/python");
    assert!(python.exists(), "the client is not installed: run `scripts/setup.sh test`");
    let mut command = Command::new(python);
    command.current_dir(folder);
    command
}

fn succeeds(output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (done, problem) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{done}\n{problem}");
}

fn flags(data: &TempDir) -> Vec<String> {
    vec!["--data-dir".to_owned(), data.path().to_str().unwrap().to_owned()]
}

/// Puts certificates, a token, and what the server must know of them into a folder; the flags of a
/// server that wants both.
fn secured(folder: &Path) -> Vec<String> {
    let write = |name: &str, content: &str| -> PathBuf {
        fs::write(folder.join(name), content).unwrap();
        folder.join(name)
    };
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // With the name of those that it signs, gRPC would take them for self-signed.
    params.distinguished_name.push(DnType::CommonName, "authority");
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let issue = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap().pem();
        [("pem", certificate), ("key", key.serialize_pem())]
    };
    for (who, name) in [("server", "localhost"), ("client", "somebody")] {
        for (kind, content) in issue(name) {
            write(&format!("{who}.{kind}"), &content);
        }
    }
    let NewToken { token, line, .. } =
        new_token("python", Scopes::parse("infer").unwrap()).unwrap();
    write("token", &token);
    let files = [
        ("--tls-cert", folder.join("server.pem")),
        ("--tls-key", folder.join("server.key")),
        ("--tls-client-ca", write("ca.pem", &ca.as_ref().pem())),
        ("--tokens", write("tokens", &line)),
    ];
    files
        .into_iter()
        .flat_map(|(flag, path)| [flag.to_owned(), path.to_str().unwrap().to_owned()])
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_does_what_its_readme_says() {
    let (data, other, files) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = Program::start(&Stores { flags: flags(&data), variables: vec![] }).await;
    let flags = [flags(&other), secured(files.path())].concat();
    let (_process, secure) = Process::serve(&Stores { flags, variables: vec![] });
    let output = python(root())
        .arg("tests/clients/python_check.py")
        .args([&open.address, &secure])
        .arg(files.path())
        .output()
        .unwrap();
    succeeds(&output);

    // The script has made this model.
    let image = fs::read(root().join("demo/datasets/digits/val/3/0135.png")).unwrap();
    let (label, probability) = rust_example::classify(open.address, "py", image).await.unwrap();
    assert!(label == "3" && probability > 0.5, "{label} {probability}");
}

#[test]
fn the_documented_rust_example_is_the_one_that_is_run() {
    let example = fs::read_to_string(root().join("tests/clients/rust_example.rs")).unwrap();
    let document = fs::read_to_string(root().join("docs/clients.md")).unwrap();
    let (_, code) = example.split_once("\n\n").unwrap(); // without the header
    let code = code.replace("pub(crate) ", "pub ");
    assert!(document.contains(&format!("```rust\n{code}```")), "the document is out of date");
}

/// Outside of the repository, so that the installed package is read, with what was generated.
#[test]
fn the_python_client_keeps_to_its_types() {
    let folder = tempfile::tempdir().unwrap();
    let config = root().join("clients/python/pyproject.toml");
    let output = python(folder.path())
        .args(["-m", "mypy", "-p", "vitq", "--config-file"])
        .arg(config)
        .output()
        .unwrap();
    succeeds(&output);
}
