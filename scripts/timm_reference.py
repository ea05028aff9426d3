"""Logits of timm models with generated weights, the reference of tests/numerics/float_parity.rs.

Usage: python scripts/timm_reference.py tests/fixtures/presets

Reads cases.json of that folder and writes logits.safetensors beside it: one float32 tensor
[images, num_classes] per case. Weights and images follow docs/checkpoints.md, "Generated weights".
Made with Python 3.11, torch 2.11.0 (CPU), timm 0.6.13, numpy 2.4.6, safetensors 0.8.0.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.numpy import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

BUFFERS = ("relative_position_index", "attn_mask")
SEED = 0


def fnv1a(text: str) -> int:
    """64-bit FNV-1a of the UTF-8 bytes."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def uniform(name: str, count: int) -> np.ndarray:
    """The first `count` values in [-1, 1) of the named stream, each exact in float32."""
    index = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(f"{SEED}/{name}")) + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    # 24 bits fill a float32 significand; both steps below are exact.
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A generated parameter."""
    if name.endswith(".weight") and len(shape) == 1:
        offset, scale = 1.0, 0.25
    elif name.endswith(".weight"):
        offset, scale = 0.0, np.sqrt(3.0 / np.prod(shape[1:]))
    elif name.endswith(".bias"):
        offset, scale = 0.0, 0.1
    else:
        offset, scale = 0.0, 0.5
    values = uniform(name, int(np.prod(shape))) * np.float32(scale) + np.float32(offset)
    return values.reshape(shape)


def images(count: int, size: int) -> np.ndarray:
    """Generated normalised images [count, 3, size, size]."""
    values = uniform("images", count * 3 * size * size) * np.float32(2)
    return values.reshape(count, 3, size, size)


def build(architecture: str, num_classes: int, model_args: dict) -> torch.nn.Module:
    """The published model, or its class with other arguments (timm's entry points allow few)."""
    if not model_args:
        return timm.create_model(architecture, num_classes=num_classes)
    family = SwinTransformer if architecture.startswith("swin") else VisionTransformer
    return family(num_classes=num_classes, **model_args)


def main() -> None:
    folder = Path(sys.argv[1])
    logits = {}
    for case, about in json.loads((folder / "cases.json").read_text()).items():
        model = build(about["architecture"], about["num_classes"], about["model_args"]).eval()
        state = model.state_dict()
        for name, tensor in state.items():
            if not name.endswith(BUFFERS):
                tensor.copy_(torch.from_numpy(parameter(name, tuple(tensor.shape))))
        size = about["model_args"].get("img_size", 224)
        with torch.no_grad():
            result = model(torch.from_numpy(images(about["images"], size)))
        logits[case] = result.numpy().copy()
        print(f"{case}: {logits[case].shape}, max |logit| {np.abs(logits[case]).max():.3f}")
    save_file(logits, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
