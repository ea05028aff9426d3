#!/usr/bin/env python3
"""Writes the seeds of the targets that no mutation would find: a tiny checkpoint, and artifacts of it.

    fuzz/seeds.py target/debug/vitq

Everything is written into tests/fixtures/fuzz. Needs nothing but Python and the program.
"""
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = ROOT / "tests/fixtures/fuzz"
DIM, HEADS, HIDDEN, PATCH, SIDE, CLASSES = 4, 2, 8, 4, 8, 10


def shapes():
    tokens = 1 + (SIDE // PATCH) ** 2
    yield "cls_token", [1, 1, DIM]
    yield "pos_embed", [1, tokens, DIM]
    yield "patch_embed.proj.weight", [DIM, 3, PATCH, PATCH]
    yield "patch_embed.proj.bias", [DIM]
    for name, rows, columns in [("attn.qkv", 3 * DIM, DIM), ("attn.proj", DIM, DIM),
                                ("mlp.fc1", HIDDEN, DIM), ("mlp.fc2", DIM, HIDDEN)]:
        yield f"blocks.0.{name}.weight", [rows, columns]
        yield f"blocks.0.{name}.bias", [rows]
    for name in ["blocks.0.norm1", "blocks.0.norm2", "norm"]:
        yield f"{name}.weight", [DIM]
        yield f"{name}.bias", [DIM]
    yield "head.weight", [CLASSES, DIM]
    yield "head.bias", [CLASSES]


def safetensors():
    random.seed(0)
    header, data = {}, b""
    for name, shape in sorted(shapes()):
        count = 1
        for axis in shape:
            count *= axis
        values = struct.pack(f"<{count}f", *(random.gauss(0, 0.5) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def config():
    arguments = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": 1, "num_heads": HEADS,
                 "mlp_ratio": HIDDEN / DIM}
    images = {"input_size": [3, SIDE, SIDE], "interpolation": "bicubic", "crop_pct": 0.9,
              "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": CLASSES,
                       "model_args": arguments, "pretrained_cfg": images}, separators=(",", ":")).encode()


def main(program):
    (SEEDS / "checkpoint").mkdir(parents=True, exist_ok=True)
    (SEEDS / "artifact").mkdir(parents=True, exist_ok=True)
    text, model = config(), safetensors()
    (SEEDS / "checkpoint/tiny-vit").write_bytes(struct.pack("<H", len(text)) + text + model)
    with tempfile.TemporaryDirectory() as work:
        checkpoint, out = pathlib.Path(work) / "tiny-vit", pathlib.Path(work) / "out"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_bytes(text)
        (checkpoint / "model.safetensors").write_bytes(model)
        digits = ROOT / "demo/datasets/digits"
        for method, bits in [("minmax", "4"), ("repq", "4"), ("igq", "4")]:
            subprocess.run([program, "bench", "--checkpoint", checkpoint, "--calib", digits / "calib", "--val",
                            digits / "val", "--methods", method, "--bits", bits, "--calib-images", "4",
                            "--device", "cpu", "--save-artifacts", "--out", out / method],
                           check=True)
            [file] = (out / method).rglob("*.safetensors")
            (SEEDS / f"artifact/tiny-vit-{method}").write_bytes(file.read_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
