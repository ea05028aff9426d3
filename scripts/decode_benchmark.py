#!/usr/bin/env python3
"""Decoding and preprocessing beside Pillow: one thread each, in turns, on the same JPEGs.

Usage: scripts/decode_benchmark.py [ROUNDS] [FOLDER]; 15 rounds unless given. Without a folder, 40
photo-like images of 500x375 are made from a fixed seed. Pillow is installed into a virtual
environment of its own below .cache/. Prints milliseconds per image and Pillow's time over ours.
"""

import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "decode-benchmark"
PACKAGES = ["pillow==13.0.0", "numpy==2.4.6"]


def enter_environment():
    """Runs this script again with the interpreter that has Pillow."""
    if pathlib.Path(sys.prefix) == CACHE / "venv":
        return
    done = CACHE / "venv" / "installed"
    python = CACHE / "venv" / "bin" / "python"
    if not done.exists() or done.read_text().split() != PACKAGES:
        venv.create(CACHE / "venv", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text("\n".join(PACKAGES))
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def photo(np, rng, width, height):
    """Noise that falls with frequency as in photographs, shapes with soft and hard edges, grain."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(fy, fx), 1 / max(width, height))

    def noise(power):
        waves = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        field = np.fft.irfft2(waves / frequency**power, s=(height, width))
        return (field - field.mean()) / field.std()

    y, x = np.mgrid[:height, :width].astype(float)
    luma, blue, red = 118 + 45 * noise(1.5), 14 * noise(1.9), 14 * noise(1.9)
    for _ in range(14):
        across, down, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, np.pi)
        u = ((x - across) * np.cos(angle) + (y - down) * np.sin(angle)) / rng.uniform(15, 130)
        v = ((y - down) * np.cos(angle) - (x - across) * np.sin(angle)) / rng.uniform(15, 130)
        distance = (np.abs(u) ** 2.5 + np.abs(v) ** 2.5 - 1) * rng.choice([8, 40, 120])
        inside = 1 / (1 + np.exp(np.clip(distance, -60, 60)))
        shade = rng.uniform(20, 230) + 30 * np.clip(u, -1, 1) + rng.uniform(2, 14) * noise(1.2)
        luma += inside * (shade - luma)
        blue += inside * (28 * rng.normal() + 5 * noise(1.8) - blue)
        red += inside * (28 * rng.normal() + 5 * noise(1.8) - red)
    luma += rng.uniform(5, 12) * noise(0.7)
    rgb = [luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue]
    return np.clip(np.stack(rgb, -1), 0, 255).round().astype(np.uint8)


def make_images(folder):
    """Qualities 80 to 95, every fifth 4:4:4 and the others 4:2:0, every tenth progressive."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        size = (500, 375) if number % 4 else (375, 500)
        image = Image.fromarray(photo(np, np.random.default_rng(1000 + number), *size))
        image.save(folder / f"{number:02}.jpg", quality=[80, 85, 90, 92, 94, 95][number % 6],
                   subsampling=0 if number % 5 == 4 else 2, progressive=number % 10 == 7)


class Pillow:
    """timm's evaluation transform in its own steps, with numpy in the place of torch."""

    def __init__(self, files):
        import numpy as np
        from PIL import Image

        self.np, self.image, self.files = np, Image, files
        self.mean = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
        self.std = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
        self.images = [self.decode(file) for file in files]

    def decode(self, file):
        return self.image.open(io.BytesIO(file)).convert("RGB")

    def preprocess(self, image):
        width, height = image.size
        size = (248, 248 * height // width) if width <= height else (248 * width // height, 248)
        image = image.resize(size, self.image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in size)
        image = image.crop((left, top, left + 224, top + 224))
        values = self.np.ascontiguousarray(self.np.asarray(image).transpose(2, 0, 1))
        values = values.astype(self.np.float32) / self.np.float32(255)
        values -= self.mean
        values /= self.std
        return values

    def round(self):
        def timed(items, work):
            start = time.perf_counter()
            for item in items:
                work(item)
            return 1e3 * (time.perf_counter() - start) / len(items)

        return {
            "decode": timed(self.files, self.decode),
            "preprocess": timed(self.images, self.preprocess),
            "whole": timed(self.files, lambda file: self.preprocess(self.decode(file))),
        }


def bench_binary():
    """Builds benches/decode.rs; the path of its program."""
    command = ["cargo", "bench", "--locked", "--bench", "decode", "--no-run",
               "--message-format=json-render-diagnostics"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    return next(message["executable"] for message in messages
                if message.get("executable") and message["target"]["name"] == "decode")


def main():
    enter_environment()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else CACHE / "images"
    if len(sys.argv) <= 2:
        make_images(folder)
    names = sorted(folder.glob("*.jpg"))
    files = [name.read_bytes() for name in names]
    binary = bench_binary()
    pillow = Pillow(files)
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(pillow.round())
        output = subprocess.run([binary, folder, "1"], check=True, stdout=subprocess.PIPE).stdout
        ours.append({name: value[0] for name, value in json.loads(output).items() if name != "images"})
    kilobytes = sum(map(len, files)) / len(files) / 1000
    print(f"{len(files)} images of {kilobytes:.0f} kB on average, {rounds} rounds, ms per image\n")
    print("| step | Pillow best | median | vitq best | median | Pillow / vitq best | median |")
    print("|---|---|---|---|---|---|---|")
    for step in ["decode", "preprocess", "whole"]:
        figures = [[each[step] for each in side] for side in (theirs, ours)]
        (best, median), (our_best, our_median) = ((min(f), statistics.median(f)) for f in figures)
        print(f"| {step} | {best:.2f} | {median:.2f} | {our_best:.2f} | {our_median:.2f} "
              f"| {best / our_best:.2f} | {median / our_median:.2f} |")


if __name__ == "__main__":
    main()
