#!/usr/bin/env python3
"""Forwards of a timm checkpoint in PyTorch and ONNX Runtime on the CPU, one whenever a line asks for it.

The other side of scripts/yardsticks.py; speaks as benches/forward.rs does: the first line of output
names the contenders, then each line of input (`NUMBER BATCH`) gets the seconds of one forward and
the first image's logits. Needs .venv-bench (`scripts/setup.sh bench`).
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import load_file
from timm.models.swin_transformer import checkpoint_filter_fn

from timm_reference import images


def load(folder):
    """The checkpoint's model in timm, fused attention included."""
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"])
    state = load_file(folder / "model.safetensors")
    if config["architecture"].startswith("swin"):
        state = checkpoint_filter_fn(state, model)  # names of the older timm
        buffers = ("relative_position_index", "attn_mask")
        own = {name: x for name, x in model.state_dict().items() if name.endswith(buffers)}
        state = {**own, **state}
    model.load_state_dict(state)
    return model.eval(), model.pretrained_cfg["input_size"][-1]


class Torch:
    """Eager PyTorch in one type of floats."""

    def __init__(self, model, kind):
        self.model, self.kind = model, kind

    def run(self, pixels):
        x = torch.from_numpy(pixels).to(self.kind)
        start = time.perf_counter()
        logits = self.model(x)
        return time.perf_counter() - start, logits[0].float().numpy()


class Onnx:
    """ONNX Runtime with its default settings; a graph of fixed shape for every batch size."""

    def __init__(self, graph_of):
        self.graph_of, self.sessions = graph_of, {}

    def run(self, pixels):
        batch = len(pixels)
        if batch not in self.sessions:
            graph = str(self.graph_of(batch))
            self.sessions[batch] = onnxruntime.InferenceSession(
                graph, providers=["CPUExecutionProvider"]
            )
        start = time.perf_counter()
        (logits,) = self.sessions[batch].run(None, {"images": pixels})
        return time.perf_counter() - start, logits[0]


class Graphs:
    """Exports of a model, made when they are first asked for."""

    def __init__(self, model, side, folder):
        self.model, self.side, self.folder = model, side, folder

    def float32(self, batch):
        path = self.folder / f"float32-{batch}.onnx"
        if not path.exists():
            pixels = torch.zeros(batch, 3, self.side, self.side)
            torch.onnx.export(
                self.model, (pixels,), str(path), dynamo=False, opset_version=17,
                input_names=["images"], output_names=["logits"],
            )
        return path

    def int8(self, batch):
        """As ONNX Runtime's guide to dynamic quantization has it: preparation, signed weights."""
        prepared = self.folder / f"prepared-{batch}.onnx"
        path = self.folder / f"int8-{batch}.onnx"
        if not path.exists():
            # Shapes are fixed, so there are no symbols to solve for (Swin's are beyond the tool).
            quant_pre_process(str(self.float32(batch)), str(prepared), skip_symbolic_shape=True)
            quantize_dynamic(str(prepared), str(path), weight_type=QuantType.QInt8)
        return path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # tracing a model warns of every constant
    # The answers' way out; exporters print, too.
    answers, sys.stdout = sys.stdout, sys.stderr
    model, side = load(args.checkpoint)
    half, _ = load(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.chdir(folder)  # the tools leave files where they are
        graphs = Graphs(model, side, Path(folder))
        contenders = {
            "torch float32": Torch(model, torch.float32),
            "torch bfloat16": Torch(half.to(torch.bfloat16), torch.bfloat16),
            "onnxruntime float32": Onnx(graphs.float32),
            "onnxruntime int8": Onnx(graphs.int8),
        }
        versions = {"torch": torch.__version__, "timm": timm.__version__,
                    "onnxruntime": onnxruntime.__version__}
        print(json.dumps({"contenders": list(contenders), "versions": versions}),
              file=answers, flush=True)
        for line in sys.stdin:
            number, batch = map(int, line.split())
            contender = list(contenders.values())[number]
            seconds, logits = contender.run(images(batch, side))
            answer = {"seconds": seconds, "logits": np.asarray(logits, np.float64).tolist()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
