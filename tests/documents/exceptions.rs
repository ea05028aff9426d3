//! What the documents hold that cannot be taken literally here. Every line must be needed.

/// Something about what begins with a text, in a document or, if its name is empty, in all.
pub(crate) struct Rule {
    pub(crate) document: &'static str,
    /// For what stands for something else: a part of it.
    pub(crate) begins: &'static str,
    /// A reason, a command, or what stands there instead.
    pub(crate) then: &'static str,
}

const fn rule(document: &'static str, begins: &'static str, then: &'static str) -> Rule {
    Rule { document, begins, then }
}

/// Commands and blocks that are not run, and why. Command lines of vitq are parsed all the same.
pub(crate) const NOT_RUN: &[Rule] = &[
    rule("", "cargo ", "would wait for the cargo that runs this test"),
    rule("", "export PATH", "the session has it"),
    rule("", "make ", "would wait for the cargo that runs this test"),
    rule("README.md", "== classify images", "make demo prints it"),
    rule("", "docker ", "no container engine"),
    rule("", "kubectl ", "no cluster; tests/program/deployment.rs checks the manifests"),
    rule("", "helm ", "no cluster; tests/program/deployment.rs checks the chart"),
    rule("", "scripts/bench.sh ", "a measurement, of minutes, with packages of gigabytes"),
    rule("", "scripts/decode_benchmark.py", "a measurement, with packages of its own"),
    rule(
        "",
        "fuzz/run.sh ",
        "a fuzzer of its own, ten minutes; tests/numerics/fuzz_corpus.rs has its findings",
    ),
    rule("docs/open-inference-protocol.md", "perf_analyzer ", "NVIDIA's program is not here"),
    rule("docs/testing.md", "LD_LIBRARY_PATH=", "needs the fuzzer and a finding"),
    rule("docs/testing.md", "SCHEDULES=", "would wait for the cargo that runs this test"),
    rule("docs/testing.md", "UPDATE_REFERENCE=", "would wait for the cargo that runs this test"),
    rule("docs/testing.md", ".venv-clients/bin/python", "tests/program/deployment.rs runs it"),
    rule("clients/python/README.md", "pip install", "scripts/setup.sh has installed it"),
    rule("clients/python/README.md", "", "tests/program/python_client.rs runs this tour"),
    rule("docs/open-inference-protocol.md", "import sys", "tests/program/tritonclient.rs runs it"),
    rule("docs/clients.md", "use tonic", "tests/program/python_client.rs compiles and runs it"),
    rule("docs/architecture.md", "pub trait", "an excerpt of the source"),
    rule("docs/imagenet.md", "", "ImageNet is not here"),
    rule("docs/accuracy.md", "vitq bench", "hours"),
    rule(
        "docs/cli.md",
        "vitq serve --database",
        "no such database and bucket; tests/program/cluster.rs has some",
    ),
    rule(
        "docs/cli.md",
        "vitq worker --database",
        "no such database and bucket; tests/program/cluster.rs has some",
    ),
    rule(
        "docs/cli.md",
        "vitq load-test --model digits --images demo/datasets/digits/val --find-capacity",
        "finds nothing on a machine that is busy with other tests",
    ),
    rule("docs/cli.md", "vitq serve --hub", "no hub; tests/program/hub.rs has one"),
    rule(
        "docs/cli.md",
        "vitq quantize --checkpoint hf-hub:",
        "no hub; tests/program/hub.rs has one",
    ),
    rule("docs/deployment.md", "vitq quantize --server https", "no cluster"),
    rule(
        "docs/security.md",
        "vitq serve --listen 0.0.0.0",
        "no certificates; tests/service/security.rs has some",
    ),
    rule("docs/security.md", "vitq models list --server https", "no such server"),
    rule("docs/security.md", "vitq serve --tokens", "no issuer; tests/service/security.rs has one"),
];

/// Commands that are run before some: what their documents take to be there.
pub(crate) const PREPARED: &[Rule] = &[
    rule(
        "docs/cli.md",
        "vitq load-test --model digits --images demo/datasets/digits/val --rate",
        "vitq quantize --checkpoint digits-vit --method minmax --bits 8 --calib-dataset digits/calib \
         --name digits && vitq models alias other digits",
    ),
    rule(
        "docs/performance.md",
        "vitq load-test --server",
        "vitq quantize --checkpoint digits-vit --method minmax --bits 8 --calib-dataset digits/calib \
         --name digits",
    ),
    rule(
        "docs/operations.md",
        "vitq healthcheck --server http://127.0.0.1:50051 --service",
        "vitq quantize --checkpoint digits-vit --method minmax --bits 8 --calib-dataset digits/calib \
         --name vit-tiny-4bit --load",
    ),
    rule(
        "docs/clients.md",
        "grpcurl -plaintext -d \"{",
        "cp demo/datasets/digits/val/3/0135.png image.png",
    ),
    rule("README.md", "import vitq", "cp demo/datasets/digits/val/3/0135.png image.png"),
];

/// In a document, what is run instead of what stands there: names that are the reader's choice, and
/// less work of the same kind.
pub(crate) const INSTEAD: &[Rule] = &[
    rule(
        "docs/quickstart.md",
        "vitq datasets upload my-images",
        "cp -rL demo/datasets/digits/calib my-images && vitq datasets upload my-images",
    ),
    rule(
        "docs/quickstart.md",
        "--calib-dataset my-images",
        "--calib-dataset my-images --calib-images 2",
    ),
    rule("README.md", "--dataset digits/val", "--dataset digits/val --limit 50"),
    rule("docs/quickstart.md", "--dataset digits/val", "--dataset digits/val --limit 50"),
    rule("docs/cli.md", "--rate 100,200,400", "--rate 10,20 --duration 0.5 --warm-up 0"),
    rule(
        "docs/cli.md",
        "--concurrency 16 --duration 30",
        "--concurrency 4 --duration 0.5 --warm-up 0",
    ),
    rule("docs/cli.md", "--bits 4,6 --seed 0,1,2", "--bits 4,6 --calib-images 1 --limit 2"),
    rule("docs/performance.md", "--concurrency 24", "--concurrency 4 --duration 0.5 --warm-up 0"),
    rule("docs/performance.md", "--concurrency 1 ", "--concurrency 1 --duration 0.5 --warm-up 0 "),
    rule("docs/performance.md", "--rate 4000", "--rate 20 --duration 0.5 --warm-up 0"),
    rule("docs/performance.md", "deit_small", "deit_tiny"),
    rule("docs/performance.md", "--limit 64", "--limit 1 --calib-images 1"),
    rule("docs/performance.md", "--limit 32", "--limit 1 --calib-images 1"),
    rule("docs/performance.md", "minmax,ubb,ptq4vit,repq,igq,vitq", "minmax"),
    // The operators' port answers health as the other does.
    rule("docs/operations.md", "127.0.0.1:9000", "127.0.0.1:50051"),
    rule("docs/operations.md", "\"127.0.0.1:50051\"", "\"127.0.0.1:0\""),
    rule("docs/operations.md", "drain-delay = 5", "drain-delay = 0"),
    rule("docs/operations.md", "[\"cuda:0\", \"cuda:1\"]", "[\"cpu\"]"),
];

/// Flags in code spans that are other programs', and whose.
pub(crate) const OTHERS_FLAGS: &[Rule] = &[
    rule("docs/deployment.md", "sbom", "docker's"),
    rule("docs/deployment.md", "provenance", "docker's"),
    rule("docs/open-inference-protocol.md", "async", "perf_analyzer's"),
    rule("docs/performance.md", "models", "benches/serving"),
    rule("docs/performance.md", "seconds", "benches/serving"),
];

/// Variables in code spans that are no flag's, and whose.
pub(crate) const OTHERS_VARIABLES: &[Rule] = &[
    rule("", "VITQ_CUDA", "scripts/setup.sh"),
    rule("docs/testing.md", "VITQ_TEST_DEVICE", "the golden tests'"),
];
