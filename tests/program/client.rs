//! The client commands as processes, against a server process on a free port.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use vitq::digest::sha256_hex;

const FAILED: i32 = 1;
const USAGE: i32 = 2;

struct Server {
    process: Child,
    url: String,
    data: TempDir,
}

impl Server {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (process, url) = serve(&data, "127.0.0.1:0");
        Self { process, url, data }
    }

    /// Kills the process, without a chance to say goodbye, and starts another one in its place.
    fn crash(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let address = self.url.strip_prefix("http://").unwrap();
        (self.process, _) = serve(&self.data, address);
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitq"));
        command.args(args).env("VITQ_SERVER", &self.url);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).expect("stdout is JSON")
    }
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

fn serve(data: &TempDir, address: &str) -> (Child, String) {
    let mut process = Command::new(env!("CARGO_BIN_EXE_vitq"))
        .args(["serve", "--listen", address, "--ops-listen", "127.0.0.1:0"])
        .args(["--device", "cpu", "--log", "error", "--data-dir"])
        .arg(data.path())
        .arg("--checkpoints")
        .arg(demo().join("checkpoints"))
        .arg("--datasets")
        .arg(demo().join("datasets"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut line = String::new();
    let stdout = process.stdout.take().expect("stdout is piped");
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let url = line.trim().strip_prefix("listening on ").expect("an address").to_owned();
    (process, url)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn quantize<'a>(name: &'a str, method: &'a str, images: &'a str) -> Vec<&'a str> {
    vec![
        "quantize",
        "--checkpoint",
        "digits-vit",
        "--method",
        method,
        "--bits",
        "4",
        "--calib-dataset",
        "digits/calib",
        "--calib-images",
        images,
        "--name",
        name,
    ]
}

#[test]
fn a_model_is_made_used_and_removed() {
    let server = Server::start();
    let made = server.json(&quantize("tiny", "minmax", "4"));
    assert_eq!(made["model"]["id"], "tiny");
    let operation = made["operation"].as_str().unwrap();

    let jobs = server.json(&["jobs", "list"]);
    assert_eq!((&jobs[0]["name"], &jobs[0]["state"]), (&made["operation"], &"succeeded".into()));
    let again = server.json(&["jobs", "watch", operation]);
    assert_eq!(again["model"]["digest"], made["model"]["digest"]);
    let waited = server.json(&["jobs", "wait", operation.strip_prefix("operations/").unwrap()]);
    assert_eq!(waited["result"]["model"]["id"], "tiny");

    let checked = ["evaluate", "--model", "tiny", "--dataset", "digits/val", "--validate-only"];
    assert_eq!(server.json(&checked)["valid"], true);
    let evaluated =
        server.json(&["evaluate", "--model", "tiny", "--dataset", "digits/val", "--limit", "20"]);
    assert_eq!(evaluated["images"], 20);
    assert!(evaluated["agreement"].is_number());

    let image = demo().join("datasets/digits/val/0/0000.png");
    let notes = demo().join("README.md");
    let images = [image.to_str().unwrap(), notes.to_str().unwrap()];
    let output = server.run(&["classify", "--model", "tiny", "--json", images[0], images[1]]);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("1 of 2 images failed"), "{}", stderr(&output));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answers["images"][0]["labels"].as_array().unwrap().len(), 5);
    assert!(answers["images"][1]["error"]["message"].is_string());

    // So does one that no call can carry.
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("large.png");
    fs::write(&large, vec![0; 40 << 20]).unwrap();
    let large = large.to_str().unwrap();
    let output = server.run(&["classify", "--model", "tiny", "--json", large, images[0]]);
    assert_eq!(output.status.code(), Some(FAILED));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answers["images"][0]["error"]["reason"], "MESSAGE_TOO_LARGE");
    assert_eq!(answers["images"][1]["labels"].as_array().unwrap().len(), 5);
    assert_eq!(answers["answered_by"], "tiny");

    let patient = ["classify", "--model", "tiny", "--timeout", "60", images[0]];
    assert!(server.run(&patient).status.success());
    let hasty = ["classify", "--model", "tiny", "--timeout", "0.000001", images[0]];
    let late = server.run(&hasty);
    assert_eq!(late.status.code(), Some(FAILED));
    assert!(stderr(&late).contains("DEADLINE_EXCEEDED"), "{}", stderr(&late));
    for time in ["-1", "0"] {
        let wrong = ["classify", "--model", "tiny", "--timeout", time, images[0]];
        assert_eq!(server.run(&wrong).status.code(), Some(USAGE), "{time}");
    }
    // A file that cannot be read fails alone, too.
    let unreadable = ["classify", "--model", "tiny", "--json", "/nowhere.png", images[0]];
    let output = server.run(&unreadable);
    assert_eq!(output.status.code(), Some(FAILED));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    let message = answers["images"][0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("/nowhere.png: No such file"), "{message}");
    assert_eq!(answers["images"][1]["labels"].as_array().unwrap().len(), 5);
    assert!(stderr(&output).contains("1 of 2 images failed"), "{}", stderr(&output));
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(40 << 20).unwrap(); // more than a message may have
    let large = ["classify", "--model", "tiny", large.path().to_str().unwrap(), images[0]];
    let output = server.run(&[&large[..], &["--json"]].concat());
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answers["images"][0]["error"]["message"].is_string(), "{answers}");
    assert_eq!(answers["images"][1]["labels"].as_array().unwrap().len(), 5, "{answers}");
    let alone = server.run(&["classify", "--model", "tiny", "/nowhere.png"]);
    assert_eq!(String::from_utf8_lossy(&alone.stdout).matches("/nowhere.png").count(), 1);

    assert_eq!(server.json(&["models", "get", "tiny"])["model"]["state"], "ready");
    assert_eq!(server.json(&["models", "unload", "tiny"])["state"], "stored");
    assert_eq!(server.json(&["models", "load", "tiny"])["state"], "ready");
    assert_eq!(server.json(&["models", "list"]).as_array().unwrap().len(), 1);
    server.json(&["models", "alias", "live", "tiny"]);
    let list = server.run(&["models", "list"]);
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("ALIASES") && list.trim_end().ends_with("live"), "{list}");
    server.json(&["models", "unalias", "live"]);
    server.json(&["models", "delete", "tiny"]);
    assert_eq!(server.run(&["models", "get", "tiny"]).status.code(), Some(FAILED));
    let methods = server.json(&["methods", "--server", &server.url]);
    let local = server.json(&["methods"]);
    assert_eq!(methods, local);
}

#[test]
fn a_refusal_names_field_and_reason() {
    let server = Server::start();
    let mut args = quantize("tiny", "minmax", "4");
    args[2] = "nowhere";
    let output = server.run(&args);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("nowhere"), "{}", stderr(&output));
    assert!(stderr(&output).contains("reason: "), "{}", stderr(&output));

    let output = server.run(&[&quantize("No Id", "minmax", "4")[..], &["--json"]].concat());
    let text = stderr(&output);
    let error: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "INVALID_ARGUMENT");
    assert_eq!(error["error"]["fields"][0]["field"], "model_id");
}

#[test]
fn ctrl_c_leaves_the_job_and_says_how_to_cancel_it() {
    let server = Server::start();
    let mut client = server
        .command(&quantize("slow", "ias", "32"))
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stderr.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let job = first.strip_prefix("job ").expect("the job's name").to_owned();
    let interrupted = Command::new("kill").args(["-INT", &client.id().to_string()]).status();
    assert!(interrupted.unwrap().success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(client.wait().unwrap().code(), Some(FAILED));
    let rest = rest.join("\n");
    assert!(rest.contains(&format!("vitq jobs watch {job} --server {}", server.url)), "{rest}");

    let state = server.json(&["jobs", "get", &job])["state"].clone();
    assert!(state == "running" || state == "queued", "{state}");
    assert_eq!(server.json(&["jobs", "cancel", &job])["cancelled"], *job);
    let output = server.run(&["jobs", "wait", &job]);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("CANCELLED"), "{}", stderr(&output));
    assert_eq!(server.json(&["jobs", "get", &job])["state"], "cancelled");
    let again = server.json(&["jobs", "cancel", &job]);
    assert_eq!((&again["ended"], &again["state"]), (&job.into(), &"cancelled".into()));
}

#[test]
fn what_is_brought_can_be_used_until_it_is_deleted() {
    let server = Server::start();
    let (checkpoint, dataset) =
        (demo().join("checkpoints/digits-vit"), demo().join("datasets/digits/calib"));
    let upload =
        ["checkpoints", "upload", checkpoint.to_str().unwrap(), "--name", "mine/digits-vit"];
    let brought = server.json(&upload);
    assert_eq!((&brought["name"], &brought["uploaded"]), (&"mine/digits-vit".into(), &true.into()));
    assert_eq!(server.json(&upload), brought, "bringing it again changes nothing");
    let set = server.json(&["datasets", "upload", dataset.to_str().unwrap(), "--name", "set"]);
    assert_eq!(set["images"], 256);
    assert_eq!(server.json(&["datasets", "get", "set"])["classes"].as_array().unwrap().len(), 10);
    let listed = server.json(&["checkpoints", "list"]);
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|c| c["name"].clone()).collect();
    assert_eq!(names, ["digits-swin", "digits-vit", "mine/digits-vit"]);

    let mut args = quantize("tiny", "minmax", "4");
    (args[2], args[8]) = ("mine/digits-vit", "set");
    let made = server.json(&args);
    assert_eq!(made["model"]["source_digest"], brought["digest"]);

    let output = server.run(&["datasets", "delete", "digits/val"]);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("not an upload"), "{}", stderr(&output));
    server.json(&["datasets", "delete", "set"]);
    server.json(&["checkpoints", "delete", "mine/digits-vit"]);
    assert_eq!(server.json(&["checkpoints", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(server.json(&["models", "get", "tiny"])["model"]["id"], "tiny");
    let output = server.run(&["checkpoints", "upload", dataset.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("config.json"), "{}", stderr(&output));
}

/// How much was sent, as a line of progress tells.
fn sent_bytes(line: &str) -> Option<u64> {
    line.strip_prefix("upload ")?.split('/').next()?.parse().ok()
}

#[test]
fn an_upload_that_does_not_fit_ends_at_its_beginning_with_the_servers_word() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("small");
    let made = ["generate", "--architecture", "vit_small", "--out", folder.to_str().unwrap()];
    server.json(&made);
    let config = folder.join("config.json");
    let right = fs::read_to_string(&config).unwrap();
    let upload = ["checkpoints", "upload", folder.to_str().unwrap()];
    for (from, to, field) in [
        ("\"embed_dim\": 384", "\"embed_dim\": 192", "chunk"),
        ("\"embed_dim\": 384", "\"embed_dim\": -1", "header.config"),
    ] {
        assert_eq!(right.matches(from).count(), 1, "{right}");
        fs::write(&config, right.replace(from, to)).unwrap();
        let output = server.run(&[&upload[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(FAILED));
        let text = stderr(&output);
        let error: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(error["error"]["code"], "INVALID_ARGUMENT", "{text}");
        assert_eq!(error["error"]["fields"][0]["field"], field, "{text}");
        assert!(error["error"]["message"].as_str().unwrap().contains("embed_dim"), "{text}");
        // Of 88 MB no more was on its way than the connection takes ahead of the server.
        assert!(!text.lines().any(|line| line.starts_with("retry")), "{text}");
        let sent = text.lines().filter_map(sent_bytes).max().unwrap_or(0);
        assert!(sent < 40_000_000, "{text}");
    }
    fs::write(&config, right).unwrap();
    assert_eq!(server.json(&upload)["name"], "small");
}

#[test]
fn an_upload_goes_on_when_its_server_is_killed_and_started_again() {
    let mut server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("small");
    let made = ["generate", "--architecture", "vit_small", "--out", folder.to_str().unwrap()];
    server.json(&made);
    let mut client = server
        .command(&["checkpoints", "upload", folder.to_str().unwrap()])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(client.stderr.take().unwrap()).lines();
    let (mut seen, mut crashed) = (Vec::new(), false);
    for line in lines.map(Result::unwrap) {
        // Of 88 MB more than a stored part has come by then.
        if !crashed && sent_bytes(&line).is_some_and(|bytes| bytes > 40_000_000) {
            server.crash();
            let left = server.json(&["uploads", "list", "--unfinished"]);
            assert_eq!(
                (&left[0]["name"], &left[0]["kind"]),
                (&"small".into(), &"checkpoint".into())
            );
            assert!(left[0]["received_bytes"].as_u64() > Some(0), "{left}");
            crashed = true;
        }
        seen.push(line);
    }
    assert!(client.wait().unwrap().success(), "{seen:?}");
    assert!(crashed && seen.iter().any(|line| line.starts_with("retry")), "{seen:?}");
    let listed = server.json(&["uploads", "list"]);
    assert_eq!((&listed[0]["name"], &listed[0]["complete"]), (&"small".into(), &true.into()));
    assert_eq!(server.json(&["uploads", "list", "--unfinished"]), serde_json::json!([]));
    let brought = server.json(&["checkpoints", "get", "small"]);
    let mut files = fs::read(folder.join("config.json")).unwrap();
    files.extend(fs::read(folder.join("model.safetensors")).unwrap());
    assert_eq!(brought["digest"], sha256_hex(&files));
}

#[test]
fn a_job_is_followed_when_its_server_is_killed_and_started_again() {
    let mut server = Server::start();
    let mut client = server
        .command(&[&quantize("followed", "ubb", "16")[..], &["--json"]].concat())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stderr.take().unwrap()).lines().map(Result::unwrap);
    let job = lines.find(|line| line.starts_with("job operations/")).unwrap();
    server.crash();
    let seen: Vec<String> = lines.collect();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{seen:?}");
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(job, format!("job {}", made["operation"].as_str().unwrap()));
    assert_eq!(made["model"]["id"], "followed");
}

#[test]
fn load_is_measured_in_an_open_and_a_closed_loop() {
    let server = Server::start();
    server.json(&quantize("tiny", "minmax", "4"));
    server.json(&quantize("other", "minmax", "4"));
    let images = demo().join("datasets/digits/val/0");
    let base = ["load-test", "--images", images.to_str().unwrap(), "--warm-up", "0"];
    let load =
        |flags: &str| server.json(&[&base[..], &flags.split(' ').collect::<Vec<_>>()].concat());
    let open = load("--model tiny=3 --model other --rate 100,200 --requests 40");
    let steps = open["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2);
    for (step, rate) in steps.iter().zip([100.0, 200.0]) {
        assert_eq!(
            (&step["offered_rate"], &step["overall"]["requests"]),
            (&rate.into(), &40.into())
        );
        let of = |model: &str| step["models"][model]["requests"].as_u64().unwrap();
        assert!(of("tiny") > of("other") && of("tiny") + of("other") == 40);
    }
    let closed = load("--model tiny --concurrency 2 --images-per-request 3 --requests 10");
    let step = &closed["steps"][0];
    assert_eq!(step["overall"]["statuses"], serde_json::json!({ "OK": 10 }));
    assert!(step["overall"]["latency_seconds"]["p50"].as_f64() > Some(0.0));
    assert!(step["overall"]["server_seconds"]["compute"]["p50"].as_f64() > Some(0.0));
    assert!((1.0..=6.0).contains(&step["overall"]["mean_batch"].as_f64().unwrap()));

    let absent = "--model absent --concurrency 1 --requests 2";
    let output = server.run(&[&base[..], &absent.split(' ').collect::<Vec<_>>()].concat());
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("no request was answered"), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("2 x NOT_FOUND: model `absent` does not exist"), "{text}");
    assert!(text.contains("p50 ms"), "{text}");

    // No rate is borne, and the search ends where no request is due any more.
    let unborne = "--model tiny --find-capacity --p99 0.000001 --rate 20 --duration 0.2 --json";
    let output = server.run(&[&base[..], &unborne.split(' ').collect::<Vec<_>>()].concat());
    assert_eq!(output.status.code(), Some(FAILED));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let steps = found["steps"].as_array().unwrap();
    assert!(found["capacity"].is_null() && (2..15).contains(&steps.len()), "{}", steps.len());
    assert_eq!(steps.last().unwrap()["overall"]["requests"], 0);
    let error = stderr(&output);
    assert!(error.contains("no capacity was found") || error.contains("no request"), "{error}");
}

#[test]
fn detach_returns_the_job_at_once() {
    let server = Server::start();
    let args = quantize("later", "minmax", "4");
    let started = server.json(&[&args[..], &["--detach"]].concat());
    let job = started["operation"].as_str().unwrap();
    let ended = server.json(&["jobs", "wait", job, "--timeout", "120"]);
    assert_eq!(ended["state"], "succeeded");
    assert!(ended["end_time"].is_string() && ended["start_time"].is_string(), "{ended}");
    let checked = server.json(&[&quantize("other", "ubb", "4")[..], &["--validate-only"]].concat());
    assert_eq!(checked["valid"], true);
    assert_eq!(server.json(&["models", "list"]).as_array().unwrap().len(), 1);
}
