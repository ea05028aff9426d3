#!/usr/bin/env python3
"""Speed of vitq's forwards beside PyTorch's and ONNX Runtime's on this machine's CPU.

Usage: scripts/bench.sh [OPTIONS]. Two programs hold the same checkpoint (generated weights) in all
their ways to compute it: benches/forward.rs and scripts/framework_forward.py. All of these are
asked for forwards of the same images in turns, round after round; the best forward counts. Writes
NAME.json and NAME.md, and prints the table. Needs the Python standard library only.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

REFERENCES = ["torch float32", "onnxruntime int8"]
# Flags of a processor that decide about the speed of integers and of bfloat16.
FEATURES = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"]
# After a forward, threads of OpenMP spin for some milliseconds; the next one is not to suffer.
PAUSE_SECONDS = 0.05


class Side:
    """A program that computes one forward for each line it gets."""

    def __init__(self, command, prefix):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = json.loads(self.process.stdout.readline())
        self.names = [prefix + name for name in self.about["contenders"]]

    def forward(self, number, batch):
        """Seconds and the first image's logits."""
        self.process.stdin.write(f"{number} {batch}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["logits"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(sides, batch, args):
    """Rows of all contenders: seconds of their forwards, in turns."""
    contenders = [(side, number, name) for side in sides for number, name in enumerate(side.names)]
    logits = {name: side.forward(number, batch)[1] for side, number, name in contenders}
    seconds = {name: [] for _, _, name in contenders}
    for _ in range(args.rounds):
        for side, number, name in contenders:
            time.sleep(PAUSE_SECONDS)
            spent = 0.0
            while spent < args.seconds:
                seconds[name].append(side.forward(number, batch)[0])
                spent += seconds[name][-1]
    expected = logits["torch float32"]
    largest = max(map(abs, expected))
    rows = []
    for _, _, name in contenders:
        best = min(seconds[name])
        difference = max(abs(a - b) for a, b in zip(logits[name], expected)) / largest
        rows.append({
            "name": name,
            "batch_size": batch,
            "forwards": len(seconds[name]),
            "best_seconds": best,
            "median_seconds": statistics.median(seconds[name]),
            "images_per_second": batch / best,
            "logits_difference": difference,
        })
    speed = {row["name"]: row["images_per_second"] for row in rows}
    for row in rows:
        row["ratios"] = {name: row["images_per_second"] / speed[name] for name in REFERENCES}
    return rows


def text_of(command):
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def machine():
    """What decides about speed."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()

    def field(name):
        values = (line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
        return next(values, "")

    flags = field("flags").split()
    return {
        "processor": field("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in FEATURES if flag in flags],
        "system": platform.system() + " " + platform.machine(),
    }


def table(model):
    """Markdown of one model's rows."""
    lines = [
        f"## {model['architecture']}",
        "",
        "| batch | | images/s | best ms | median ms | × torch float32 | × ONNX Runtime int8 |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in model["rows"]:
        best, median = 1000 * row["best_seconds"], 1000 * row["median_seconds"]
        ratios = " | ".join(f"{row['ratios'][name]:.2f}" for name in REFERENCES)
        lines.append(
            f"| {row['batch_size']} | {row['name']} | {row['images_per_second']:.2f} | {best:.1f} "
            f"| {median:.1f} | {ratios} |"
        )
    same = max(r["logits_difference"] for r in model["rows"] if r["name"] == "vitq float")
    seconds = ", ".join(f"{name} {s:.1f} s" for name, s in model["calibration_seconds"].items())
    lines += [
        "",
        f"Logits of `vitq float` and of torch float32 differ by {same:.1e} of the largest. "
        f"Calibrations on {model['calibration_images']} images: {seconds}.",
        "",
    ]
    return lines


def report(result):
    """The whole as Markdown."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = " → ".join(f"{value:.2f}" for value in result["load_average"])
    lines = [
        "# Forwards of vitq, PyTorch and ONNX Runtime",
        "",
        f"{result['date']}, commit {result['commit']}. {about['processor']}, {about['cores']} cores, "
        f"{', '.join(about['features'])}; load average {load}. {versions}. Same generated weights and "
        f"images for all, stem and head float; best of {result['rounds']} rounds in turns, "
        f"`{result['command']}`.",
        "",
    ]
    for model in result["models"]:
        lines += table(model)
    return "\n".join(lines).rstrip() + "\n"


def save(result, path):
    """Writes what is known so far: PATH.json and PATH.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    path.with_name(path.name + ".json").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".md").write_text(report(result), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="deit_small,swin_tiny", help="generated architectures")
    parser.add_argument("--methods", default="minmax,repq,ubb")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--batches", default="8,1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a contender's turn, at least")
    parser.add_argument("--calib-images", type=int, default=8)
    parser.add_argument("--vitq", required=True, help="the program vitq")
    parser.add_argument("--forward", required=True, help="the program of benches/forward.rs")
    parser.add_argument("--python", required=True, help="Python of .venv-bench")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--name", help="of the results; cpu-DATE unless given")
    args = parser.parse_args()
    date = datetime.date.today().isoformat()
    commit = text_of(["git", "rev-parse", "--short=12", "HEAD"]) or "unknown"
    if text_of(["git", "status", "--porcelain", "--untracked-files=no"]):
        commit += " with changes"
    result = {
        "date": date,
        "commit": commit,
        "command": f"make bench (--rounds {args.rounds} --seconds {args.seconds:g})",
        "machine": machine(),
        "rounds": args.rounds,
        "seconds_of_a_turn": args.seconds,
        "load_average": [os.getloadavg()[0]],
        "versions": {},
        "models": [],
    }
    for architecture in args.models.split(","):
        folder = args.work / architecture
        if not (folder / "model.safetensors").exists():
            subprocess.run([args.vitq, "generate", "--architecture", architecture, "--classes", "10",
                            "--out", folder], check=True, stdout=subprocess.DEVNULL)
        ours = Side([args.forward, "--checkpoint", folder, "--methods", args.methods, "--bits",
                     args.bits, "--calib-images", str(args.calib_images)], "vitq ")
        theirs = Side([args.python, "scripts/framework_forward.py", "--checkpoint", folder], "")
        result["versions"] = theirs.about["versions"]
        rows = [row for batch in args.batches.split(",")
                for row in measure([theirs, ours], int(batch), args)]
        ours.close()
        theirs.close()
        result["models"].append({
            "architecture": architecture,
            "calibration_images": args.calib_images,
            "calibration_seconds": ours.about["calibration_seconds"],
            "rows": rows,
        })
        result["load_average"].append(os.getloadavg()[0])
        save(result, args.out / (args.name or f"cpu-{date}"))
    print(report(result))


if __name__ == "__main__":
    main()
