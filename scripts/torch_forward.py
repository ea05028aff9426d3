#!/usr/bin/env python3
"""Speed of DeiT forwards in PyTorch: eager float32, eager float16, compiled float16.

The yardstick of scripts/gpu_check.sh. Needs torch only; the modules are those of a plain
vision transformer (fused attention included), weights are random. Writes JSON to stdout.
"""

import argparse
import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}
DEPTH, PATCH, SIDE, CLASSES = 12, 16, 224, 1000


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):  # [n, tokens, dim]
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, tokens, d]
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, (SIDE // PATCH) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def images_per_second(model, images, device, seconds):
    """Whole forwards for at least `seconds`, after warming up."""
    for _ in range(3):
        model(images)
    synchronize(device)
    start, count = time.perf_counter(), 0
    while True:
        model(images)
        synchronize(device)
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return count * len(images) / elapsed


def measure(name, kind, batch, args):
    half = kind != "float32"
    model = DeiT(*SIZES[name]).eval().to(args.device, torch.float16 if half else torch.float32)
    if kind == "compiled_float16":
        model = torch.compile(model, dynamic=False)
    images = torch.randn(batch, 3, SIDE, SIDE, device=args.device, dtype=torch.float16 if half else torch.float32)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = {"model": name, "kind": kind, "batch_size": batch, "images_per_second": None}
    try:
        row["images_per_second"] = images_per_second(model, images, args.device, args.seconds)
    except Exception as error:  # no compiler, no memory: the other rows still count
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    if args.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="deit_small,deit_base")
    parser.add_argument("--kinds", default="float32,float16,compiled_float16")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--compiled-batches", default="64", help="compiling takes long")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing is begun")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows, end = [], time.monotonic() + args.deadline
    with torch.inference_mode():
        # Kinds that compile come last, so that a deadline leaves the others.
        for kind in args.kinds.split(","):
            for name in args.models.split(","):
                compiled = kind.startswith("compiled")
                batches = args.compiled_batches if compiled else args.batches
                for batch in map(int, batches.split(",")):
                    if time.monotonic() > end:
                        print(f"{name} {kind} {batch}: no time left", file=sys.stderr)
                        continue
                    rows.append(measure(name, kind, batch, args))
                    print(rows[-1], file=sys.stderr)
    json.dump({"torch": torch.__version__, "rows": rows}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
