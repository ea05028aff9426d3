//! How the messages of docs/troubleshooting.md come about.

/// A message as the document has it, `…` for what differs, and a command that fails with it.
pub(crate) struct Trouble {
    pub(crate) says: &'static str,
    pub(crate) after: &'static str,
}

const fn trouble(says: &'static str, after: &'static str) -> Trouble {
    Trouble { says, after }
}

/// Run once before all of them: models, broken files.
pub(crate) const BEFORE: &str = "
vitq quantize --checkpoint digits-vit --method minmax --bits 8 --calib-images 4 \
  --calib-dataset digits/calib --name digits
vitq models alias live digits
mkdir -p images flat odd/x pickle short cut other wrong
cp demo/datasets/digits/val/3/0135.png flat
cp demo/checkpoints/digits-vit/config.json pickle
cp demo/checkpoints/digits-vit/config.json short
cp demo/checkpoints/digits-vit/config.json cut
printf 'PK\\003\\004 and so on, for some bytes' >pickle/model.safetensors
head -c 1000 demo/checkpoints/digits-vit/model.safetensors >short/model.safetensors
head -c 1000000 demo/checkpoints/digits-vit/model.safetensors >cut/model.safetensors
tar -czf set.tar.gz flat
head -c 34000000 /dev/zero >large.png
cp demo/checkpoints/digits-vit/model.safetensors other
sed 's/vit_tiny_patch16_224/resnet50/' demo/checkpoints/digits-vit/config.json >other/config.json
cp demo/checkpoints/digits-swin/model.safetensors wrong
cp demo/checkpoints/digits-vit/config.json wrong
echo no image at all, whatever its name >odd/x/a.png
echo 'queue-image = 4' >misspelt.toml
echo 'queue-images = \"many\"' >unusable.toml
";

pub(crate) const TROUBLES: &[Trouble] = &[
    trouble(
        "device: cuda:0 is not there: libtorch sees no CUDA device",
        "CUDA_VISIBLE_DEVICES= vitq check-config --device cuda:0",
    ),
    trouble("checkpoint … does not exist", "$QUANTIZE --checkpoint nothing"),
    trouble("dataset … does not exist", "vitq evaluate --model digits --dataset nothing"),
    trouble(
        "the file is a zip archive (TorchScript or torch.save), only safetensors is accepted",
        "vitq checkpoints upload pickle",
    ),
    trouble("model.safetensors is truncated or foreign: …", "vitq checkpoints upload short"),
    trouble(
        "model.safetensors is truncated or not a safetensors file: …",
        "vitq checkpoints upload cut",
    ),
    trouble("architecture … is not supported, …", "vitq checkpoints upload other"),
    trouble("the config says …, the tensors say …", "vitq checkpoints upload wrong"),
    trouble("…: holds no images: expected CLASS/*.jpg, png or webp", "vitq datasets upload flat"),
    trouble("…: is neither a folder nor a .tar file", "vitq datasets upload flat/0135.png"),
    trouble(
        "…: the file is compressed (gzip), only plain tar is accepted",
        "vitq datasets upload set.tar.gz",
    ),
    trouble("… is neither a JPEG nor a PNG nor a WebP image", "vitq datasets upload odd"),
    trouble(
        "dataset.count: … images asked for, the data set has …",
        "$QUANTIZE --checkpoint digits-vit --calib-images 1000",
    ),
    trouble("model … already exists", "$QUANTIZE --checkpoint digits-vit --name digits"),
    trouble(
        "model_id: an id has 1 to 63 lower-case letters, digits and inner hyphens, …",
        "$QUANTIZE --checkpoint digits-vit --name Digits_8",
    ),
    trouble(
        "…: it was made of checkpoint, method and bits, give another one",
        "$QUANTIZE --checkpoint digits-vit-with-a-name-of-more-characters-than-a-models-id-may-have",
    ),
    trouble(
        "bits: 2 bits are not supported, choose 3 to 8",
        "vitq quantize --checkpoint digits-vit --method ubb --bits 2 --calib-dataset digits/calib",
    ),
    trouble(
        "unknown method …, known are …",
        "vitq quantize --checkpoint digits-vit --method gptq --bits 4 --calib-dataset digits/calib",
    ),
    trouble("options.…: unknown option, …", "$QUANTIZE --checkpoint digits-vit --option groups=8"),
    trouble(
        "options.groups: … groups do not divide the … channels of …",
        "vitq quantize --checkpoint digits-vit --method ubb --bits 4 --calib-dataset digits/calib \
         --groups 7",
    ),
    trouble(
        "no connection to …: Connection refused …",
        "vitq models list --server http://127.0.0.1:1",
    ),
    trouble(
        "no connection to https://…: Connection reset by peer …",
        "vitq models list --server https://127.0.0.1:50051",
    ),
    trouble("--server …: relative URL without a base", "vitq models list --server 127.0.0.1:1"),
    trouble(
        "no connection to …: invalid URL, scheme is missing",
        "vitq models list --server localhost:1",
    ),
    trouble("model … does not exist", "vitq classify --model nothing flat/0135.png"),
    trouble(
        "images[0].content: the bytes are neither a JPEG nor a PNG nor a WebP image",
        "vitq classify --model digits odd/x/a.png",
    ),
    trouble(
        "message length too large: found … bytes, the limit is: … bytes",
        "vitq classify --model digits large.png",
    ),
    trouble(
        "the token would cross the network in the clear: use https://, or --insecure",
        "vitq models list --server http://192.0.2.1:1 --token secret",
    ),
    trouble("alias … names model …: move or remove it first", "vitq models delete digits"),
    trouble(
        "checkpoint … is a folder of the server, not an upload",
        "vitq checkpoints delete digits-vit",
    ),
    trouble("… is in use by another server", "$SERVE --data-dir vitq-data"),
    trouble(
        "port …: Address already in use …",
        "$SERVE --data-dir other-data --listen 127.0.0.1:50051",
    ),
    trouble("listen: … is not a loopback address, …", "$SERVE --listen 0.0.0.0:0"),
    trouble("…: unknown environment variable, …", "VITQ_QUEUE_IMAGE=4 $SERVE"),
    trouble("…: unknown key …", "$SERVE --config misspelt.toml"),
    trouble("…: invalid value … for …", "$SERVE --config unusable.toml"),
];

/// Then a server that asks who calls and takes few images at once.
pub(crate) const GUARD: &[&str] = &[
    "vitq token reader --scopes infer --json >reader.json",
    "python -c 'import json; t = json.load(open(\"reader.json\")); open(\"reader\", \"w\").write(t[\"token\"]); \
     open(\"tokens\", \"w\").write(t[\"line\"])'",
    "vitq serve --tokens tokens --queue-images 4",
];

pub(crate) const GUARDED: &[Trouble] = &[
    trouble("a bearer token, or a client certificate, is needed", "vitq models list"),
    trouble("the token or certificate is not valid here", "vitq models list --token another"),
    trouble("… may not do this: it needs …", "vitq models delete digits --token-file reader"),
    trouble(
        "… images in one call, at most … fit",
        "vitq classify --model digits --token-file reader flat/0135.png{,,,,}",
    ),
];

/// Messages that are not provoked here, and why.
pub(crate) const UNPROVOKED: &[(&str, &str)] = &[
    ("setup: Rust is missing: …", "another machine"),
    ("setup: cargo is …, but … is needed", "another machine"),
    ("setup: please install the system packages …", "another machine"),
    ("setup: pip could not install …", "another machine"),
    ("error while loading shared libraries: libtorch_cpu.so…", "the dynamic linker's"),
    ("the client is not installed: run …", "a test's"),
    ("operation … is making model …", "in time; tests/service/quantize.rs"),
    ("… workers died over this job, it is not tried again", "a minute; tests/stores/job_store"),
    ("… jobs are waiting already", "in time"),
    ("grpc-status header missing, mapped from HTTP status code 404", "the operators' port is any"),
    ("the queue is full: … images are in the server", "in time; tests/service/overload.rs"),
    ("deadline exceeded", "in time; tests/service/overload.rs"),
    ("an answer takes …, longer than the call may take", "in time; tests/service/overload.rs"),
    ("internal error, the server's log has it as …", "a mistake of the program"),
    ("the database is unavailable: …", "minutes; tests/program/outage.rs"),
    ("hub: this build cannot use the hub: it was made without feature hub", "the feature"),
];
