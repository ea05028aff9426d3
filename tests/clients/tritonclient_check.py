"""What tritonclient does with a server: tritonclient_check.py HOST:PORT CASE

CASE is a JSON file: the model and its digest, paths of images, their logits as Classify gives them,
and a file of their pixels (float32 [n, 3, side, side])."""

import json
import os
import queue
import subprocess
import sys

import numpy
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

server, case_path = sys.argv[1:]
with open(case_path) as file:
    case = json.load(file)
model = case["model"]
logits = numpy.array(case["logits"], dtype=numpy.float32)
count, classes = logits.shape
contents = []
for path in case["images"]:
    with open(path, "rb") as file:
        contents.append(file.read())
client = InferenceServerClient(server)


def encoded(images, shape=None):
    array = numpy.array(images, dtype=numpy.object_).reshape(shape or [len(images)])
    tensor = InferInput("image", list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return [tensor]


def floats(array, name="pixels", datatype="FP32"):
    tensor = InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return [tensor]


def refused(status, text, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{status}", error
        assert text in error.message(), error
        return
    raise AssertionError(f"not refused: {text}")


def server_and_model():
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
    assert not client.is_model_ready("absent") and not client.is_model_ready(model, "2")
    metadata = client.get_server_metadata()
    assert metadata.name == "vitq"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(metadata.extensions)
    metadata = client.get_model_metadata(model, "1", as_json=True)
    assert metadata["versions"] == ["1"], metadata
    shapes = {t["name"]: t["shape"] for t in metadata["inputs"] + metadata["outputs"]}
    side = str(case["side"])
    assert shapes == {
        "image": ["-1", "1"],
        "pixels": ["-1", "3", side, side],
        "logits": ["-1", str(classes)],
        "probabilities": ["-1", str(classes)],
    }, shapes
    config = client.get_model_config(model).config
    assert config.max_batch_size >= count and config.backend == "vitq"
    assert [tensor.name for tensor in config.input] == ["image", "pixels"]
    assert config.instance_group[0].kind == 2 and config.dynamic_batching.priority_levels == 2
    assert config.parameters["digest"].string_value == case["digest"]


def inference():
    for inputs in [encoded(contents), encoded(contents, [count, 1]), floats(pixels())]:
        answer = client.infer(model, inputs, request_id="r1", priority=2, timeout=10_000_000)
        assert numpy.array_equal(answer.as_numpy("logits"), logits), inputs[0].name()
        probabilities = answer.as_numpy("probabilities")
        assert numpy.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
        response = answer.get_response()
        assert (response.id, response.model_name, response.model_version) == ("r1", model, "1")
        assert response.parameters["digest"].string_param == case["digest"]
    one = [InferRequestedOutput("logits")]
    answer = client.infer(model, encoded(contents), outputs=one, compression_algorithm="gzip")
    assert answer.as_numpy("probabilities") is None
    assert numpy.array_equal(answer.as_numpy("logits"), logits)


def pixels():
    values = numpy.fromfile(case["pixels"], dtype=numpy.float32)
    return values.reshape(count, 3, case["side"], case["side"])


def classification():
    best = [InferRequestedOutput("logits", class_count=3)]
    lines = client.infer(model, encoded(contents), outputs=best).as_numpy("logits")
    assert lines.shape == (count, 3)
    for row, expected in zip(lines, logits):
        order = numpy.argsort(-expected, kind="stable")[:3]
        for line, index in zip(row, order):
            value, found, label = line.decode().split(":", 2)
            assert numpy.float32(value) == expected[index] and int(found) == index
            assert label == case["labels"][index]


def asynchronous():
    answers = queue.Queue()
    for image in contents * 4:
        client.async_infer(
            model, encoded([image]), lambda result, error: answers.put((result, error))
        )
    for _ in range(4 * count):
        result, error = answers.get(timeout=60)
        assert error is None, error
        row = result.as_numpy("logits")
        assert (row == logits).all(axis=1).any()
    client.async_infer(
        "absent", encoded(contents), lambda result, error: answers.put((result, error))
    )
    result, error = answers.get(timeout=60)
    assert result is None and "absent" in error.message()


def stream():
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number, image in enumerate(contents * 4):
        name = "absent" if number == 1 else model
        client.async_stream_infer(name, encoded([image]), request_id=str(number))
    for number in range(4 * count):
        result, error = answers.get(timeout=60)
        if number == 1:
            assert result is None and "absent" in error.message()
            continue
        assert error is None, error
        response = result.get_response()
        assert response.id == str(number)
        assert response.parameters["triton_final_response"].bool_param
        assert numpy.array_equal(result.as_numpy("logits")[0], logits[number % count])
    client.stop_stream()


def statistics():
    def counts():
        entry = client.get_inference_statistics(model).model_stats[0]
        stats = entry.inference_stats
        return stats.success.count, stats.fail.count, entry.inference_count, entry.execution_count

    before = counts()
    client.infer(model, encoded(contents))
    refused("INVALID_ARGUMENT", "image[0]", client.infer, model, encoded([b"no image"]))
    success, fail, images, batches = (a - b for a, b in zip(counts(), before))
    assert (success, fail, images) == (1, 1, count) and 1 <= batches <= count
    names = [entry.name for entry in client.get_inference_statistics().model_stats]
    assert model in names


def repository():
    def state():
        return {m.name: m.state for m in client.get_model_repository_index().models}[model]

    client.unload_model(model, unload_dependents=True)
    assert not client.is_model_ready(model) and state() == "UNAVAILABLE"
    client.load_model(model)
    assert client.is_model_ready(model) and state() == "READY"
    client.unload_model(model)
    assert numpy.array_equal(client.infer(model, encoded(contents)).as_numpy("logits"), logits)
    refused("NOT_FOUND", "absent", client.load_model, "absent")
    refused("INVALID_ARGUMENT", "config", client.load_model, model, config='{"backend": "python"}')
    files = {"file:1/model.py": b"import os"}
    refused("INVALID_ARGUMENT", "config", client.load_model, model, config="{}", files=files)


def refusals():
    infer, image = client.infer, encoded(contents)
    refused("NOT_FOUND", "absent", infer, "absent", image)
    refused("NOT_FOUND", "version", infer, model, image, model_version="2")
    refused("INVALID_ARGUMENT", "inputs", infer, model, image + floats(pixels()))
    refused("INVALID_ARGUMENT", "shape", infer, model, floats(pixels()[:, :, 1:]))
    doubles = floats(pixels().astype(numpy.float64), datatype="FP64")
    refused("INVALID_ARGUMENT", "datatype", infer, model, doubles)
    broken = pixels()
    broken[1, 0, 0, 0] = numpy.nan
    refused("INVALID_ARGUMENT", "pixels[1]", infer, model, floats(broken))
    refused("INVALID_ARGUMENT", "image[1]", infer, model, encoded([contents[0], b"GIF89a"]))
    refused("DEADLINE_EXCEEDED", "", infer, model, image, client_timeout=1e-6)
    refused("DEADLINE_EXCEEDED", "", infer, model, image, timeout=1)
    shared = InferInput("image", [1], "BYTES")
    shared.set_shared_memory("region", 10)
    refused("INVALID_ARGUMENT", "shared_memory", infer, model, [shared])


def example():
    script = os.path.join(os.path.dirname(__file__), "tritonclient_example.py")
    command = [sys.executable, script, server, model, case["images"][0]]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0].split()[0] == case["labels"][logits[0].argmax()], lines


for check in [
    server_and_model,
    inference,
    classification,
    asynchronous,
    stream,
    statistics,
    repository,
    refusals,
    example,
]:
    print(check.__name__, flush=True)
    check()
