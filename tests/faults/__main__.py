"""The runner: see tests/faults/__init__.py."""

import argparse
import json
import sys
from collections import Counter

from tests.faults.worker import AREAS, ROOT, Worker

RECORD = ROOT / "tests" / "faults" / "RESULTS.md"


def campaign(area, cases, seed, worker, show=print):
    """Run cases of an area: (Counter of faults tried, list of (number, answer) that failed)."""
    tried, failed, number = Counter(), [], 0
    while tried.total() < cases:
        answer = worker(area, seed, number)
        tried.update(answer["faults"] or {answer["fault"]: answer["n"]})
        if answer["complaint"]:
            failed.append((number, answer))
            show(f"{area} --seed {seed} --first {number}: {answer['fault']}: {answer['complaint']}")
        number += 1
    return tried, failed


def write_record(rows):
    """The table of faults tried and survived, which SECURITY.md links.

    rows: (area, fault, tried, failed); other areas keep those of the run before.
    """
    areas = {area for area, *_ in rows}
    for line in RECORD.read_text().splitlines() if RECORD.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in AREAS.keys() - areas:
            rows.append((*cells[:2], int(cells[2]), int(cells[2]) - int(cells[3])))
    lines = [
        "# Faults tried", "",
        "Written by `python -m tests.faults --record`; a case is made from area, seed and number.",
        "",
        "| area | fault | tried | survived |", "| --- | --- | ---: | ---: |",
    ]  # fmt: skip
    totals = [0, 0]
    for area, fault, n, lost in sorted(rows):
        lines.append(f"| {area} | {fault} | {n} | {n - lost} |")
        totals = [totals[0] + n, totals[1] + n - lost]
    lines += [f"| **all** | | **{totals[0]}** | **{totals[1]}** |", ""]
    RECORD.write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--area", default="all", choices=[*AREAS, "all"])
    parser.add_argument("--cases", type=int, default=100, help="of each area")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--first", type=int, help="this one case alone, with its whole answer")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # a campaign is watched in its log
    worker, rows, lost = Worker(), [], 0
    try:
        if args.first is not None:
            print(json.dumps(worker(args.area, args.seed[0], args.first), indent=1))
            return
        for area in AREAS if args.area == "all" else [args.area]:
            tried, failed = Counter(), []
            for seed in args.seed:
                more, wrong = campaign(area, args.cases, seed, worker)
                tried, failed = tried + more, failed + wrong
            bad = Counter(answer["fault"] for _, answer in failed)
            rows += [(area, fault, n, bad.pop(fault, 0)) for fault, n in tried.items()]
            rows += [(area, fault, n, n) for fault, n in bad.items()]
            print(f"{area}: {tried.total()} cases, {len(failed)} failed", flush=True)
            lost += len(failed)
    finally:
        worker.close()
    if args.record:
        write_record(rows)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
