"""What our Python client does with a server: python_check.py URL SECURE_URL FOLDER

FOLDER holds the certificates, the token and the files of the server at SECURE_URL. The working
directory is the repository's root."""

import asyncio
import io
import os
import re
import shutil
import socket
import sys
import threading
from pathlib import Path

import grpc
import numpy
import PIL.Image
import vitq
from vitq.v1 import operation_pb2

server, secure, folder = sys.argv[1:]
os.environ["VITQ_SERVER"] = server
images = sorted(Path("demo/datasets/digits/val").glob("*/*.png"))[::45]
calibration = {"bits": 8, "dataset": "digits/calib", "count": 8}


def refused(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"not refused with {kind.__name__}")


def tour():
    """The blocks of the README, one after the other."""
    text = Path("clients/python/README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["good"].best.name == "3" and isinstance(names["bad"].error, vitq.InvalidArgument)
    assert len(names["found"]) == len(names["batches"])


def quantize():
    steps = []
    with vitq.Client() as client:
        result = client.quantize(
            "digits-vit", "minmax", name="py", progress=steps.append, load=True, **calibration
        )
        assert result.model.id == "py" and result.report.images == 8
        assert any(step.stage == "calibrate" and step.units for step in steps), steps
        model = client.model("py").model
        assert model.state == model.STATE_READY and model.weight_bits == 8
        name = client.start_quantize(
            "digits-vit",
            "minmax",
            name="py-own",
            weight_bits=4,
            activation_bits="float",
            role_bits={"fc2": (8, "float")},
            images=images[:4],
            labels={"made-by": "python"},
        )
        again = client.follow_quantize(name)
        assert again.model.labels == {"made-by": "python"} and again.model.weight_bits == 4
        assert [(r.role, r.weight_bits) for r in again.model.role_bits] == [("fc2", 8)]
        metadata = operation_pb2.JobMetadata()
        assert client.operation(name).metadata.Unpack(metadata) and metadata.model == "py-own"
        assert name in [operation.name for operation in client.operations()]
        client.cancel(name)  # has ended: nothing happens
        client.delete("py-own")
        assert "py-own" not in [model.id for model in client.models()]


def errors():
    with vitq.Client() as client:
        error = refused(
            vitq.InvalidArgument,
            client.quantize,
            "digits-vit",
            "minmax",
            bits=2,
            name="x",
            dataset="digits/calib",
        )
        assert error.reason == "INVALID_ARGUMENT" and "weight_bits" in str(error)
        assert [violation.field for violation in error.violations] == ["weight_bits"]
        error = refused(vitq.NotFound, client.classify, "absent", images[:1])
        assert error.reason == "MODEL_NOT_FOUND" and error.code == grpc.StatusCode.NOT_FOUND, (
            error.reason
        )
        refused(vitq.NotFound, client.follow_quantize, "operations/01ARZ3NDEKTSV4RRFFQ69G5FAV")
        refused(vitq.DeadlineExceeded, client.classify, "py", images, timeout=1e-4)
        refused(TypeError, client.classify, "py", images[0])
        refused(TypeError, client.classify, "py", [numpy.zeros((8, 8, 3))])
        refused(TypeError, client.quantize, "digits-vit", "minmax", name="x", dataset="d")
        # A misspelled argument is not ignored, a missing one is named.
        for wrong in [{"name": "x", "stem_heads": "int8"}, {}]:
            error = refused(TypeError, client.quantize, "digits-vit", "minmax", **wrong, **calibration)
            assert next(iter(wrong.keys() - {"name"}), "name") in str(error), error
        refused(
            ValueError, client.quantize, "digits-vit", "minmax", name="x", weight_bits=3, **calibration
        )
        # What was sent before an image that is not there is answered.
        answers = []
        stream = client.classify_stream("py", [images[:2], ["absent.png"], images[:1]])
        refused(FileNotFoundError, lambda: answers.extend(stream))
        assert [(number, len(answer)) for number, answer in answers] == [(0, 2)], answers
        refused(TypeError, client.evaluate, "py", "digits/val", limits=5)
        refused(TypeError, vitq.Client, tokens="secret")
    with vitq.Client("http://127.0.0.1:1") as nobody:
        refused(vitq.Unavailable, nobody.models)
    refused(ValueError, vitq.Client, "http://vitq.example.org:50051", token="secret")
    refused(ValueError, vitq.Client, "vitq:50051")


def pixels():
    with vitq.Client() as client:
        for mode in ["RGB", "L", "RGBA", "CMYK"]:
            image = PIL.Image.open(images[0]).convert(mode)
            file = io.BytesIO()
            image.save(file, "JPEG" if mode == "CMYK" else "PNG")
            (answer,) = client.classify("py", [image])
            assert answer.error is None, (mode, answer.error)
        array = numpy.asarray(PIL.Image.open(images[0]).convert("RGB"))
        one, two = client.classify("py", [images[0], array], priority="bulk")
        assert one.labels == two.labels and len(one.labels) == 5


def uploads():
    copy = Path(folder) / "copy"
    for path in images:
        target = copy / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with vitq.Client() as client:
        done = client.upload_checkpoint("demo/checkpoints/digits-vit", "brought")
        again = client.upload_checkpoint("demo/checkpoints/digits-vit", "brought")
        assert (
            done.complete and again.sha256 == done.sha256 and again.create_time == done.create_time
        )
        assert client.upload_dataset(copy).images == len(images)
        assert {"brought"} <= {c.name for c in client.checkpoints() if c.uploaded}
        assert {"copy"} <= {d.name for d in client.datasets() if d.uploaded}
        assert client.evaluate("py", "copy").metrics.images == len(images)
        client.delete_dataset("copy")
        client.delete_checkpoint("brought")


class Cutting:
    """Forwards one connection after the other and cuts the first ones after so many bytes of
    answers."""

    def __init__(self, cuts):
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        host, port = server.removeprefix("http://").split(":")
        while True:
            near, _ = self._listener.accept()
            self.count += 1
            far = socket.create_connection((host, int(port)))
            budget = self._cuts.pop(0) if self._cuts else None
            threading.Thread(target=self._copy, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, budget), daemon=True).start()

    @staticmethod
    def _copy(source, sink, budget):
        try:
            while data := source.recv(1024):
                sink.sendall(data)
                if budget is not None and (budget := budget - len(data)) < 0:
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def broken_streams():
    seen = []
    network = Cutting([500, 900, 1500])
    with vitq.Client(network.address) as client:
        result = client.quantize(
            "digits-vit", "ubb", name="py-cut", progress=seen.append, **calibration
        )
        assert result.model.id == "py-cut" and network.count >= 3, network.count
        sites = [(site.path, site.operand) for step in seen for site in step.sites]
        assert sites and len(sites) == len(set(sites)), sites  # none is told twice
        upload = client.upload_checkpoint("demo/checkpoints/digits-vit", "cut")
        assert upload.complete
        client.delete_checkpoint("cut")


async def asynchronous():
    async with vitq.aio.Client() as client:
        result = await client.quantize("digits-vit", "minmax", name="py-aio", **calibration)
        assert result.model.id == "py-aio"
        assert {"py", "py-aio"} <= {model.id for model in await client.models()}
        await client.alias("py-live", "py-aio")
        answers = await asyncio.gather(*(client.classify("py-live", [i]) for i in images))
        assert {answer.model for answer in answers} == {"py-aio"}
        requests = [images[:3], [b"no image"], images[3:5]]
        found = dict([pair async for pair in client.classify_stream("py-live", requests)])
        assert [len(found[n]) for n in range(3)] == [3, 1, 2] and found[1][0].error
        answers = []
        try:
            async for pair in client.classify_stream("py-live", [images[:2], ["absent.png"]]):
                answers.append(pair)
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("an image that is not there was sent")
        assert [number for number, _ in answers] == [0], answers
        await client.unload("py-aio")
        assert (await client.load("py-aio")).device == "cpu"
        await client.unalias("py-live")
        figures = (await client.evaluate("py-aio", "digits/val", limit=20)).metrics
        assert figures.images == 20
        assert (await client.upload_checkpoint("demo/checkpoints/digits-vit", "aio")).complete
        await client.delete_checkpoint("aio")
        try:
            await client.model("absent")
        except vitq.NotFound as error:
            assert error.reason == "MODEL_NOT_FOUND"
        await client.delete("py-aio")


def credentials():
    def path(name):
        return os.path.join(folder, name)

    tls = {
        "tls_ca": path("ca.pem"),
        "tls_cert": path("client.pem"),
        "tls_key": path("client.key"),
        "tls_server_name": "localhost",
    }
    with vitq.Client(secure, token_file=path("token"), **tls) as client:
        assert client.methods()
        assert refused(vitq.PermissionDenied, client.delete, "py").reason == "PERMISSION_DENIED"
    with vitq.Client(secure, token="unknown", **tls) as client:
        assert refused(vitq.Unauthenticated, client.methods).reason == "INVALID_TOKEN"
    with vitq.Client(secure, tls_ca=path("ca.pem"), tls_server_name="localhost") as client:
        refused(vitq.Unavailable, client.methods)


for check in [tour, quantize, errors, pixels, uploads, broken_streams, asynchronous, credentials]:
    print(check.__name__, flush=True)
    if asyncio.iscoroutinefunction(check):
        asyncio.run(check())
    else:
        check()
