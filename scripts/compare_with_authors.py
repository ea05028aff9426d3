#!/usr/bin/env python3
"""Repeats the authors' runs of demo/reference/peer_results.json with vitq: the same calibration
files, bits and seeds, and the options that ask for the released code's behaviour.

Prints one Markdown table; fails if a row is more than 0.5 points of top-1, 1 point of agreement or
0.5 dB below the authors'. Resumes from --out. Takes about 20 minutes on one core."""

import argparse
import json
import os
import subprocess
import sys

# How each of the authors' configurations is asked for; {iters} comes from the row.
RUNS = {
    "platform": ("ubb", "int8", ["variant=released"]),
    "ptq4vit": ("ptq4vit", "same", ["gradient=noise", "sos_overlap=released", "stem_input=float"]),
    "repq": ("repq", "same", ["variant=released"]),
    "ias": ("ias", "same", ["variant=released", "iterations={iters}"]),
}
# Largest shortfall that is accepted: points, points, dB.
WINDOW = {"top1": 0.5, "agreement": 1.0, "logits_sqnr_db": 0.5}


def measure(args, row, files):
    """The one row that vitq gives for a row of the authors."""
    method, stem_head, options = RUNS[row["peer"]]
    out = os.path.join(args.out, row["logits"].replace("/", "-"))
    os.makedirs(out, exist_ok=True)
    listed = os.path.join(out, "calibration.txt")
    with open(listed, "w", encoding="utf-8") as file:
        file.writelines(name.removeprefix("calib/") + "\n" for name in files)
    command = [
        args.binary, "bench", "--checkpoint", f"demo/checkpoints/{row['model']}",
        "--calib", "demo/datasets/digits/calib", "--val", "demo/datasets/digits/val",
        "--calib-files", listed, "--methods", method, "--bits", row["bits"][1:].split("A")[0],
        "--seed", str(row["seed"]), "--stem-head", stem_head, "--out", out,
    ]  # fmt: skip
    for option in options:
        command += ["--option", option.format(iters=row.get("iters"))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "results.json"), encoding="utf-8") as file:
        (found,) = json.load(file)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", default="target/release/vitq")
    parser.add_argument("--out", default="bench/out/authors")
    parser.add_argument("--peers", default=",".join(RUNS), help="which of the authors' runs")
    args = parser.parse_args()
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    with open("demo/reference/peer_results.json", encoding="utf-8") as file:
        peers = json.load(file)

    print("| method | model | bits | seed | authors: top-1 / agreement / SQNR dB | vitq | within |")
    print("|---|---|---|---|---|---|---|")
    outside = 0
    for row in peers["results"]:
        if row["peer"] not in args.peers.split(","):
            continue
        files = peers["calibration_files"][f"{row['model']}/n{row['n_calib']}/seed{row['seed']}"]
        found = measure(args, row, files)
        ours = {"top1": found["top1"], "agreement": found["agreement"], "logits_sqnr_db": found["sqnr_db"]}
        short = [key for key, most in WINDOW.items() if ours[key] < row[key] - most]
        outside += bool(short)
        figures = [" / ".join(f"{values[key]:.2f}" for key in WINDOW) for values in (row, ours)]
        verdict = "no: " + ", ".join(short) if short else "yes"
        print(f"| {RUNS[row['peer']][0]} | {row['model']} | {row['bits']} | {row['seed']} | "
              f"{figures[0]} | {figures[1]} | {verdict} |", flush=True)  # fmt: skip
    sys.exit(1 if outside else 0)


if __name__ == "__main__":
    main()
