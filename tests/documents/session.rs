//! A folder with the repository's files, a server, and commands that are run there as a reader would.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

use tempfile::TempDir;

use crate::program::Process;
use crate::root;

/// Where the documents expect a server.
const DOCUMENTED: &str = "127.0.0.1:50051";
/// What a server is started with for commands before which the document starts none.
const SERVER: &str = "vitq serve --checkpoints demo/checkpoints --datasets demo/datasets";

pub(crate) struct Session {
    folder: TempDir,
    server: Option<(Process, String)>,
    /// What the commands have printed.
    pub(crate) printed: String,
}

impl Session {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for shared in ["clients", "demo", "proto", "scripts", "tests"] {
            symlink(root().join(shared), folder.path().join(shared)).unwrap();
        }
        let python = root().join(".venv-clients/bin/python");
        assert!(python.exists(), "the clients are not installed: run `scripts/setup.sh test`");
        let programs = folder.path().join("bin");
        fs::create_dir(&programs).unwrap();
        symlink(env!("CARGO_BIN_EXE_vitq"), programs.join("vitq")).unwrap();
        // A link would lose the packages beside the interpreter.
        script(&programs.join("python"), &format!("exec {} \"$@\"", python.display()));
        let grpcurl = root().join("tests/documents/grpcurl.py");
        script(&programs.join("grpcurl"), &format!("exec python {} \"$@\"", grpcurl.display()));
        Self { folder, server: None, printed: String::new() }
    }

    /// Writes a file that commands read.
    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).unwrap();
    }

    /// Runs a command to its end. A server is left running in place of the one before.
    pub(crate) fn run(&mut self, command: &str) {
        if command.starts_with("vitq serve") {
            return self.serve(command);
        }
        if self.server.is_none() {
            self.serve(SERVER);
        }
        let (_, address) = self.server.as_ref().unwrap();
        let command = command.replace(DOCUMENTED, address.strip_prefix("http://").unwrap());
        let output = self.shell(&command).env("VITQ_SERVER", address).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (printed, problem) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{command}\n{printed}\n{problem}");
        self.printed += &printed;
    }

    /// What a command says that is to fail, on one line.
    pub(crate) fn fails(&mut self, command: &str) -> String {
        let (_, address) = self.server.as_ref().unwrap();
        let command = command.replace(DOCUMENTED, address.strip_prefix("http://").unwrap());
        let mut shell = self.shell(&command);
        shell.env("VITQ_SERVER", address).env("VITQ_OPS_LISTEN", "127.0.0.1:0");
        let output = shell.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(!output.status.success(), "{command} does not fail\n{text}");
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn serve(&mut self, command: &str) {
        self.stop();
        let mut server = self.shell(&format!("exec {command}"));
        server
            .env("VITQ_LISTEN", "127.0.0.1:0")
            .env("VITQ_OPS_LISTEN", "127.0.0.1:0")
            .env("VITQ_DEVICE", "cpu")
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let (process, address) = Process::listening(&mut server);
        self.printed += &format!("listening on {address}\n");
        self.server = Some((process, address));
    }

    /// As by Ctrl-C.
    fn stop(&mut self) {
        if let Some((mut process, _)) = self.server.take() {
            process.signal("INT");
            assert!(process.0.wait().unwrap().success());
        }
    }

    fn shell(&self, command: &str) -> Command {
        let programs = self.folder.path().join("bin");
        let path = format!("{}:{}", programs.display(), env::var("PATH").unwrap());
        let mut shell = Command::new("bash");
        shell.args(["-euo", "pipefail", "-c", command]).current_dir(self.folder.path());
        shell.env("PATH", path).env("OMP_NUM_THREADS", "1").env("VITQ_DRAIN_DELAY", "0");
        shell.stdin(Stdio::null());
        shell
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

fn script(path: &Path, line: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, format!("#!/bin/sh\n{line}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
