#!/usr/bin/env python3
"""Joins what scripts/gpu_check.sh measured into one JSON file and one Markdown table."""

import argparse
import json
import os
import re
import sys


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def peak_memory(path):
    """Largest sample in MiB; None without a GPU."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        samples = [int(line) for line in file if line.strip().isdigit()]
    return max(samples, default=None)


def test_results(path):
    """What the test programs printed: counts, and the names of what failed."""
    passed, failed, failures = 0, 0, []
    with open(path, encoding="utf-8") as file:
        programs = file.read().split("Running ")[1:]
    for program in programs:
        result = re.search(r"^test result: .* (\d+) passed; (\d+) failed", program, re.MULTILINE)
        names = re.findall(r"^test (\S+) \.\.\. FAILED", program, re.MULTILINE)
        if result:
            passed, failed = passed + int(result[1]), failed + int(result[2])
        else:  # It crashed, or took too long.
            passed += len(re.findall(r"^test \S+ \.\.\. ok", program, re.MULTILINE))
            names.append(program.split()[0])
            failed += len(names)
        failures += names
    return {"passed": passed, "failed": failed, "failures": failures}


def accuracy_table(rows):
    print("| model | method | bits | executor | device | top-1 | agreement | SQNR dB | calibration s |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        sqnr = "–" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        print(
            f"| {row['checkpoint']} | {row['method']} | {row['weight_bits']}/{row['activation_bits']}"
            f" | {row['executor']} | {row['device']} | {row['top1']:.2f} | {row['agreement']:.2f} | {sqnr}"
            f" | {row['calibration_seconds']:.2f} |"
        )


def forward_table(ours, torch_rows):
    """Images per second: a line per model and batch, our executors and torch side by side."""
    speed = {}
    for row in ours:
        kind = "vitq " + (row["method"] if row["method"] == "float" else f"{row['method']} w{row['weight_bits']}a{row['activation_bits']} {row['executor']}")
        speed[row["checkpoint"], row["batch_size"], kind] = row["images_per_second"]
    for row in torch_rows:
        speed[row["model"], row["batch_size"], "torch " + row["kind"]] = row["images_per_second"]
    kinds = list(dict.fromkeys(kind for _, _, kind in speed))
    print("| images/s | batch | " + " | ".join(kinds) + " |")
    print("| --- | ---: |" + " ---: |" * len(kinds))
    for model, batch in dict.fromkeys((model, batch) for model, batch, _ in speed):
        cells = [speed.get((model, batch, kind)) for kind in kinds]
        print(f"| {model} | {batch} | " + " | ".join("–" if c is None else f"{c:.0f}" for c in cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ["machine", "device", "memory", "accuracy", "forward", "torch", "commit", "output"]:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--tests")
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    with open(args.machine, encoding="utf-8") as file:
        machine = file.read().strip()
    torch = read(args.torch)
    tests = test_results(args.tests) if args.tests else None
    report = {
        "machine": machine,
        "commit": args.commit,
        "seconds": args.seconds,
        "gpu_peak_mib": peak_memory(args.memory),
        "torch": torch["torch"],
        "golden_tests": tests,
        "accuracy": read(args.accuracy),
        "forward": read(args.forward),
        "torch_forward": torch["rows"],
    }
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    accuracy_table(report["accuracy"])
    print()
    forward_table(report["forward"], report["torch_forward"])
    print()
    for row in report["forward"]:
        if row["method"] != "float" and row["batch_size"] == report["forward"][0]["batch_size"]:
            print(f"{row['checkpoint']} {row['method']}: calibration {row['calibration_seconds']:.2f} s, {row['calibration_images']} images")
    if tests is None:
        print("golden tests: left out, TESTS is not set")
    else:
        print(f"golden tests on {args.device}: {tests['passed']} passed, {tests['failed']} failed", *tests["failures"])
    print(f"{machine}; commit {args.commit}; torch {torch['torch']}; GPU memory at most {report['gpu_peak_mib']} MiB; {args.seconds:.0f} s")
    # None at all: the names have changed.
    if tests and (tests["failed"] or not tests["passed"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
