"""Two results that `make bench` saved, side by side.

    python -m bench.compare A B [--above 1.2] [--plot FILE]

A and B are files, or the beginnings of their names in `bench/results` (0001). Printed is B's median
time over A's, and between what it lies if each is a time of its middle half. Ends with 1 where a
ratio is above `--above`, by default 1.2. Times of different machines do not compare: what differs
is said first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


class Ratio(NamedTuple):
    name: str
    low: float
    median: float
    high: float


def find(name: str) -> Path:
    """The file of a saved result. Raises `LookupError`."""
    if Path(name).is_file():
        return Path(name)
    found = sorted(RESULTS.glob(f"*/{name}*.json"))
    if len(found) != 1:
        said = ", ".join(str(path) for path in found) or "nothing"
        raise LookupError(f"{name} is no file, and in {RESULTS} it names {said}; name one")
    return found[0]


def read(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved


def ratios(one: dict[str, Any], other: dict[str, Any]) -> list[Ratio]:
    """Of the benchmarks that both have, the worst first."""
    before, after = ({b["fullname"]: b["stats"] for b in x["benchmarks"]} for x in (one, other))
    found = [
        Ratio(
            name,
            after[name]["q1"] / before[name]["q3"],
            after[name]["median"] / before[name]["median"],
            after[name]["q3"] / before[name]["q1"],
        )
        for name in before.keys() & after.keys()
    ]
    return sorted(found, key=lambda ratio: (-ratio.median, ratio.name))


def where(saved: dict[str, Any]) -> dict[str, str]:
    """What two results should have in common to be compared, and their commits."""
    machine = saved["machine_info"]
    return {
        "processor": machine["cpu"]["brand_raw"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "versions": ", ".join(f"{name} {v}" for name, v in machine["versions"].items()),
        "commit": saved["commit_info"]["id"][:7] + " with changes" * saved["commit_info"]["dirty"],
    }


def plot(found: list[Ratio], above: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    medians = [ratio.median for ratio in found]
    spread = [[r.median - r.low for r in found], [r.high - r.median for r in found]]
    colours = ["tab:red" if median > above else "tab:blue" for median in medians]
    axes.barh(range(len(found)), medians, xerr=spread, color=colours, ecolor="black")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvline(above, color="tab:red", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(found)), [ratio.name.removeprefix("bench/") for ratio in found])
    axes.invert_yaxis()
    axes.set_xlabel("B's time over A's")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--above", type=float, default=1.2)
    parser.add_argument("--plot", type=Path, help="picture to draw")
    options = parser.parse_args()
    try:
        one, other = (read(find(name)) for name in (options.a, options.b))
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    first, second = where(one), where(other)
    for what in first:
        if first[what] != second[what]:
            print(f"{what}: A {first[what]}, B {second[what]}")
    found = ratios(one, other)
    if not found:
        print("error: A and B have no benchmark in common", file=sys.stderr)
        return 2
    for ratio in found:
        mark = "  SLOWER" if ratio.median > options.above else ""
        print(f"{ratio.median:6.2f}  {ratio.low:.2f} - {ratio.high:.2f}  {ratio.name}{mark}")
    if options.plot:
        plot(found, options.above, options.plot)
    return int(any(ratio.median > options.above for ratio in found))


if __name__ == "__main__":
    sys.exit(main())
