"""Classifies an image: example.py HOST:PORT MODEL IMAGE"""

import sys

import numpy
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

server, model, path = sys.argv[1:]
with open(path, "rb") as file:
    images = numpy.array([file.read()], dtype=numpy.object_)
image = InferInput("image", list(images.shape), "BYTES")
image.set_data_from_numpy(images)
best = InferRequestedOutput("probabilities", class_count=3)
answer = InferenceServerClient(server).infer(model, [image], outputs=[best], client_timeout=10)
for line in answer.as_numpy("probabilities")[0]:
    probability, index, label = line.decode().split(":", 2)
    print(f"{label} {float(probability):.4f}")
