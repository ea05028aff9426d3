//! The real program as a process of its own.

#![allow(dead_code, reason = "each test that names the module uses a part of it")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tonic::transport::Channel;

/// The flags and variables that tell a process where its stores are.
pub(crate) struct Stores {
    pub(crate) flags: Vec<String>,
    pub(crate) variables: Vec<(String, String)>,
}

impl Stores {
    /// The real program, with probes and jobs as all have them.
    pub(crate) fn program(&self, command: &str) -> Command {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
        let mut program = Command::new(env!("CARGO_BIN_EXE_vitq"));
        for ours in ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            program.env_remove(ours);
        }
        program
            .env("OMP_NUM_THREADS", "1")
            .envs(self.variables.iter().map(|(key, value)| (key, value)))
            .args([command, "--ops-listen", "127.0.0.1:0", "--device", "cpu"])
            .args([
                "--job-attempts",
                "1000",
                "--max-queued-jobs",
                "1000",
                "--max-jobs-per-client",
                "1000",
            ])
            .args(&self.flags)
            .arg("--checkpoints")
            .arg(demo.join("checkpoints"))
            .arg("--datasets")
            .arg(demo.join("datasets"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        program
    }
}

/// A process; killed, without a chance to say goodbye, when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Sends a signal: `TERM`, `STOP`, `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// A server, and where it listens.
    pub(crate) fn serve(stores: &Stores) -> (Self, String) {
        Self::listening(stores.program("serve").args(["--listen", "127.0.0.1:0"]))
    }

    /// A server that a command starts, its stdout in a pipe, and where it listens.
    pub(crate) fn listening(command: &mut Command) -> (Self, String) {
        let mut process = Self(command.spawn().unwrap());
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ");
        let address = address.unwrap_or_else(|| panic!("it does not listen: {command:?}"));
        (process, address.to_owned())
    }
}

/// A server, and a connection to it.
pub(crate) struct Program {
    /// The server.
    pub(crate) process: Process,
    pub(crate) channel: Channel,
    /// Where it listens: `http://127.0.0.1:PORT`.
    pub(crate) address: String,
}

impl Program {
    pub(crate) async fn start(stores: &Stores) -> Self {
        let (process, address) = Process::serve(stores);
        let channel = Channel::from_shared(address.clone()).unwrap().connect().await.unwrap();
        Self { process, channel, address }
    }
}
