//! The manifests of deploy/ against the schemas of Kubernetes and against the real program: its flags,
//! variables, configuration and metrics. `scripts/setup.sh test` installs what the checks need.

use std::path::Path;
use std::process::Command;

#[test]
fn manifests_are_valid_and_fit_the_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join(".venv-clients/bin/python");
    assert!(python.exists(), "the checks are not installed: run `scripts/setup.sh test`");
    let output = Command::new(python)
        .current_dir(root)
        .args(["tests/clients/deployment_check.py", env!("CARGO_BIN_EXE_vitq")])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (done, problem) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{done}\n{problem}");
}
