"""Stands in for grpcurl, which cannot be had where the tests are: the flags and forms that the documents use.

grpcurl.py -plaintext [-d JSON] HOST:PORT list | describe NAME | SERVICE/METHOD

Like grpcurl, it learns services and messages from the server's reflection."""

import argparse

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

parser = argparse.ArgumentParser()
parser.add_argument("-plaintext", action="store_true", required=True)
parser.add_argument("-d", dest="data", default="{}")
parser.add_argument("server")
parser.add_argument("words", nargs="+")
arguments = parser.parse_args()
channel = grpc.insecure_channel(arguments.server)


def messages():
    """The messages of grpc.reflection.v1 that are needed here."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="reflection.proto", package="reflection", syntax="proto3")

    def message(name, *fields):
        proto = file.message_type.add(name=name)
        for name, number, kind, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            named = kind if isinstance(kind, str) else None
            kind = field.TYPE_MESSAGE if named else kind
            proto.field.add(name=name, number=number, type=kind, label=label, type_name=named)

    texts = [("file", 3), ("symbol", 4), ("list", 7)]
    message("Request", *((name, number, field.TYPE_STRING, False) for name, number in texts))
    message("Files", ("file", 1, field.TYPE_BYTES, True))
    message("Service", ("name", 1, field.TYPE_STRING, False))
    message("Services", ("service", 1, ".reflection.Service", True))
    message("Response", ("files", 4, ".reflection.Files", False), ("services", 6, ".reflection.Services", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kinds = [pool.FindMessageTypeByName(f"reflection.{name}") for name in ["Request", "Response"]]
    return [message_factory.GetMessageClass(kind) for kind in kinds]


Request, Response = messages()


def ask(**request):
    call = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=Request.SerializeToString,
        response_deserializer=Response.FromString,
    )
    return next(call(iter([Request(**request)])))


def known(symbol):
    """The descriptors of a symbol and of what it needs."""
    pool = descriptor_pool.DescriptorPool()
    added = set()

    def add(**which):
        for content in ask(**which).files.file:
            file = descriptor_pb2.FileDescriptorProto.FromString(content)
            if file.name not in added:
                added.add(file.name)
                for needed in file.dependency:
                    add(file=needed)
                pool.Add(file)

    add(symbol=symbol)
    return pool


def call(path):
    service, method = path.split("/")
    found = known(service).FindServiceByName(service).methods_by_name[method]
    request = message_factory.GetMessageClass(found.input_type)
    answer = message_factory.GetMessageClass(found.output_type)
    invoke = channel.unary_stream if found.server_streaming else channel.unary_unary
    invoke = invoke(f"/{path}", request.SerializeToString, answer.FromString)
    answers = invoke(json_format.Parse(arguments.data, request()))
    for message in answers if found.server_streaming else [answers]:
        print(json_format.MessageToJson(message))


match arguments.words:
    case ["list"]:
        print(*(service.name for service in ask(list="*").services.service), sep="\n")
    case ["describe", name]:
        print(descriptor := known(name).FindMessageTypeByName(name).full_name)
    case [path]:
        call(path)
