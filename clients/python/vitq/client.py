"""The blocking client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from google.longrunning import operations_pb2 as longrunning
from google.longrunning import operations_pb2_grpc

import grpc
from vitq import _answers, _requests, _uploads
from vitq._answers import Answer
from vitq._channel import Connection, pause
from vitq._errors import Error, NotFound, from_rpc
from vitq._jobs import Job, Progress, Result, Start
from vitq._uploads import Load, Upload
from vitq.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    upload_pb2,
    upload_pb2_grpc,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitq._channel import ConnectionOptions
    from vitq._images import ImageLike
    from vitq._requests import EvaluateOptions, Priority, QuantizeOptions


class Client:
    """A connection to a server; safe to share between threads.

    Arguments that are not given come from the variables of the command line: `VITQ_SERVER`,
    `VITQ_TOKEN`, `VITQ_TOKEN_FILE`, `VITQ_TLS_CA`, `VITQ_CLIENT_CERT`, `VITQ_CLIENT_KEY`,
    `VITQ_TLS_SERVER_NAME`. `timeout` is the deadline of calls in seconds; jobs have none.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        timeout: float = 30.0,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        self._connection = Connection(server, options)
        self._timeout = timeout
        target, settings = self._connection.target(), self._connection.settings()
        credentials = self._connection.credentials()
        if credentials is None:
            self.channel = grpc.insecure_channel(target, settings)
        else:
            self.channel = grpc.secure_channel(target, credentials, settings)
        self._quantization = quantization_pb2_grpc.QuantizationServiceStub(self.channel)
        self._evaluation = evaluation_pb2_grpc.EvaluationServiceStub(self.channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._models = model_pb2_grpc.ModelServiceStub(self.channel)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self.channel)
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self.channel)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self.channel)
        self._uploads = upload_pb2_grpc.UploadServiceStub(self.channel)
        self._operations = operations_pb2_grpc.OperationsStub(self.channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    # Quantization and evaluation

    def quantize(
        self,
        checkpoint: str,
        method: str,
        *,
        progress: Progress = False,
        **options: Unpack[QuantizeOptions],
    ) -> quantization_pb2.QuantizeResult:
        """Calibrates on the server until the model is stored.

        `progress` shows bars, or is a function that gets every `JobProgress`. A stream that breaks
        is continued where it was. A program that stops does not stop the job: see `cancel`.
        """
        request = _requests.quantize(checkpoint, method, options)
        job = Job(quantization_pb2.QuantizeResult, progress)
        return self._follow(job, self._quantization, self._quantization.Quantize, request)

    def evaluate(
        self,
        model: str,
        dataset: str,
        *,
        progress: Progress = False,
        **options: Unpack[EvaluateOptions],
    ) -> evaluation_pb2.EvaluateResult:
        """Measures a model on a data set of the server; otherwise like `quantize`."""
        request = _requests.evaluate(model, dataset, options)
        job = Job(evaluation_pb2.EvaluateResult, progress)
        return self._follow(job, self._evaluation, self._evaluation.Evaluate, request)

    def start_quantize(
        self, checkpoint: str, method: str, **options: Unpack[QuantizeOptions]
    ) -> str:
        """The name of the job, `operations/…`, once the server has accepted it."""
        request = _requests.quantize(checkpoint, method, options)
        return self._start(self._quantization, self._quantization.Quantize, request)

    def start_evaluate(self, model: str, dataset: str, **options: Unpack[EvaluateOptions]) -> str:
        """As `start_quantize`."""
        request = _requests.evaluate(model, dataset, options)
        return self._start(self._evaluation, self._evaluation.Evaluate, request)

    def follow_quantize(
        self, operation: str, *, progress: Progress = False
    ) -> quantization_pb2.QuantizeResult:
        """Follows a job that was started before, from its beginning to its end."""
        job = Job(quantization_pb2.QuantizeResult, progress, operation)
        return self._follow(job, self._quantization)

    def follow_evaluate(
        self, operation: str, *, progress: Progress = False
    ) -> evaluation_pb2.EvaluateResult:
        """As `follow_quantize`."""
        job = Job(evaluation_pb2.EvaluateResult, progress, operation)
        return self._follow(job, self._evaluation)

    def operation(self, name: str) -> longrunning.Operation:
        """A job; its metadata is a `vitq.v1.JobMetadata`."""
        request = longrunning.GetOperationRequest(name=name)
        return self._call(self._operations.GetOperation, request)

    def operations(self, filter: str = "") -> list[longrunning.Operation]:
        """All jobs, or those of a filter like `metadata.state=RUNNING`."""
        request = longrunning.ListOperationsRequest(name="operations", filter=filter)
        return self._all(self._operations.ListOperations, request, "operations")

    def cancel(self, operation: str) -> None:
        """Asks a job to stop at its next safe point."""
        request = longrunning.CancelOperationRequest(name=operation)
        self._call(self._operations.CancelOperation, request)

    # Classification

    def classify(
        self,
        model: str,
        images: Iterable[ImageLike],
        *,
        top_k: int = 5,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Answer:
        """A prediction for each image: paths, bytes of files, PIL images, or arrays of uint8.

        A bad image fails alone: its prediction has an `error`.
        """
        request = _requests.classify(model, images, top_k, priority)
        return _answers.answer(self._call(self._inference.Classify, request, timeout))

    def classify_stream(
        self,
        model: str,
        requests: Iterable[Iterable[ImageLike]],
        *,
        top_k: int = 5,
        priority: Priority = "bulk",
    ) -> Iterator[tuple[int, Answer | Error]]:
        """Many requests on one stream, which has no deadline.

        Answers come as they get ready, with the number of their request from 0. A request that
        fails does so alone. An image that cannot be read here ends the stream: what was sent before
        is answered, then its exception is raised.
        """
        broken: list[Exception] = []

        def messages() -> Iterator[inference_pb2.ClassifyStreamRequest]:
            try:
                for number, images in enumerate(requests):
                    request = _requests.classify(model, images, top_k, priority)
                    yield inference_pb2.ClassifyStreamRequest(id=number, request=request)
            except Exception as error:  # gRPC would raise another one, and drop what is on its way
                broken.append(error)

        call = self._inference.ClassifyStream(messages(), metadata=self._connection.metadata())
        try:
            for response in call:
                yield response.id, _answers.outcome(response)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()
        if broken:
            raise broken[0]

    # Models

    def models(self) -> list[model_pb2.Model]:
        """All models of the server."""
        return self._all(self._models.ListModels, model_pb2.ListModelsRequest(), "models")

    def model(self, model: str) -> model_pb2.GetModelResponse:
        """A model with its calibration report and labels."""
        return self._call(self._models.GetModel, model_pb2.GetModelRequest(model=model))

    def load(self, model: str, *, timeout: float = 300.0) -> model_pb2.Model:
        """Brings a model to a device; classifying does so by itself."""
        request = model_pb2.LoadModelRequest(model=model)
        response: model_pb2.LoadModelResponse = self._call(self._models.LoadModel, request, timeout)
        return response.model

    def unload(self, model: str) -> model_pb2.Model:
        """Frees a model's memory; it stays stored."""
        request = model_pb2.UnloadModelRequest(model=model)
        response: model_pb2.UnloadModelResponse = self._call(self._models.UnloadModel, request)
        return response.model

    def delete(self, model: str) -> None:
        """Removes a model for good."""
        self._call(self._models.DeleteModel, model_pb2.DeleteModelRequest(model=model))

    def alias(self, alias: str, model: str) -> model_pb2.Model:
        """Points a second name, new or old, to a model."""
        request = model_pb2.SetAliasRequest(alias=alias, model=model)
        response: model_pb2.SetAliasResponse = self._call(self._models.SetAlias, request)
        return response.model

    def unalias(self, alias: str) -> None:
        """Forgets an alias; its model stays."""
        self._call(self._models.DeleteAlias, model_pb2.DeleteAliasRequest(alias=alias))

    # What there is to quantize with, from and for

    def methods(self) -> list[catalog_pb2.Method]:
        """The methods with their options."""
        response: catalog_pb2.ListMethodsResponse = self._call(
            self._catalog.ListMethods, catalog_pb2.ListMethodsRequest()
        )
        return list(response.methods)

    def checkpoints(self) -> list[checkpoint_pb2.Checkpoint]:
        """The float models that can be quantized, apart from the hub's."""
        request = checkpoint_pb2.ListCheckpointsRequest()
        return self._all(self._checkpoints.ListCheckpoints, request, "checkpoints")

    def datasets(self) -> list[dataset_pb2.Dataset]:
        """The labelled data sets."""
        request = dataset_pb2.ListDatasetsRequest()
        return self._all(self._datasets.ListDatasets, request, "datasets")

    def delete_checkpoint(self, name: str) -> None:
        """Deletes an uploaded checkpoint; models made from it stay."""
        request = checkpoint_pb2.DeleteCheckpointRequest(name=name)
        self._call(self._checkpoints.DeleteCheckpoint, request)

    def delete_dataset(self, name: str) -> None:
        """Deletes an uploaded data set."""
        request = dataset_pb2.DeleteDatasetRequest(name=name)
        self._call(self._datasets.DeleteDataset, request)

    def upload_checkpoint(
        self, folder: str | PathLike[str], name: str | None = None
    ) -> upload_pb2.Upload:
        """Brings a folder with config.json and model.safetensors; goes on where it broke off."""
        return self._upload(_uploads.checkpoint(folder, name))

    def upload_dataset(
        self, path: str | PathLike[str], name: str | None = None
    ) -> upload_pb2.Upload:
        """Brings a folder of class folders, or a tar file of one; goes on where it broke off."""
        return self._upload(_uploads.dataset(path, name))

    # How calls are made

    def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """One answer. What the server refuses for a time is asked again after that time."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        for attempt in itertools.count(1):
            left = deadline - time.monotonic()
            try:
                return method(request, timeout=left, metadata=self._connection.metadata())
            except grpc.RpcError as error:
                refusal = from_rpc(error)
            time.sleep(pause(refusal, attempt, left))

    def _all(self, method: Any, request: Any, field: str) -> list[Any]:
        """What all pages of a list hold."""
        request.page_size = 1000
        found: list[Any] = []
        while True:
            page = self._call(method, request)
            found.extend(getattr(page, field))
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    def _start(self, service: Any, method: Any, request: Any) -> str:
        job = Start(quantization_pb2.QuantizeResult, False)
        self._run(job, service, method, request)
        return job.name

    def _follow(
        self, job: Job[Result], service: Any, method: Any = None, request: Any = None
    ) -> Result:
        self._run(job, service, method, request)
        assert job.result is not None, "a job that ends has a result or an error"
        return job.result

    def _run(self, job: Job[Any], service: Any, method: Any, request: Any) -> None:
        """Feeds a job with its events until it has what it wants."""
        try:
            while True:
                call = (
                    service.Watch(job.where(), metadata=self._connection.metadata())
                    if job.name
                    else method(request, metadata=self._connection.metadata())
                )
                broken = None
                try:
                    for event in call:
                        if job.take(event):
                            return
                except grpc.RpcError as error:
                    broken = from_rpc(error)
                finally:
                    call.cancel()
                time.sleep(job.resume(broken))
        finally:
            job.close()

    def _upload(self, load: Load) -> upload_pb2.Upload:
        upload = Upload(load)
        while True:
            try:
                found = self._call(self._uploads.GetUpload, load.asked())
            except NotFound:
                found = upload_pb2.GetUploadResponse()
            if upload.is_whole(found.upload):
                return upload.found
            try:
                metadata = self._connection.metadata()
                response = self._uploads.Upload(upload.parts(), metadata=metadata)
                return upload.end(response.upload)
            except grpc.RpcError as error:
                broken = from_rpc(error)
            time.sleep(upload.resume(broken))
