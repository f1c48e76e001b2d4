"""The real SGLang as a server beside the trainer on one GPU: is it right, and how fast is it.

    python -m bench.gpu_sglang --out sglang.json

Parts like those of `bench.gpu`: in processes with time limits, faults noted and not raised, results
written after every row; the same command again runs what failed or was not reached. A server's log
lies beside `--out`.

| part | answers |
|---|---|
| agrees | log-probs of Qwen2 and Qwen3 beside transformers', before and after weights came through CUDA IPC and after memory was lent and taken back |
| collects | a BEL collection's share of prompt tokens that come from the cache |
| speed | tokens/s at `top_logprobs` 0, 5 and 16 |

A bare machine needs Python 3.12, torch 2.11, transformers 5.17, nvcc, g++ and ninja, and the wheels
of `gpu_sglang_wheels.txt` (`--wheels DIR` fetches them where there is a package registry):

    python -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl
    export PYTHONPATH=/tmp/site:kernels/src:.

They lack SGLang's own GPU binaries: attention is Triton's, and `standins/` holds in PyTorch what a
dense model calls of them, so a full installation should be somewhat faster. `--tiny` runs all of it
on a CPU, where `make sglang-cpu` was run: without the stand-ins, CUDA IPC (weights go by disk) and
lending, which only a GPU can show. `bench/NOTES.md` says what was tried without one.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from bench.gpu.__main__ import (
    TEMPORARY,
    TINY_SLOWER,
    Process,
    Results,
    fetch_wheels,
    machine,
    one_part,
)

PROGRAM = "bench.gpu_sglang"
WHEELS = Path(__file__).parent.parent / "gpu_sglang_wheels.txt"
PARTS = {"agrees": 240.0, "collects": 110.0, "speed": 170.0}  # seconds


def run_all(names: list[str], results: Results, out: Path, tiny: bool) -> None:
    folder = TEMPORARY / "sglang"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        process = Process(name, folder, *(["--tiny"] if tiny else []), program=PROGRAM)
        try:
            process.go(PARTS[name] * (TINY_SLOWER if tiny else 1))
            part = process.result()
        finally:
            process.end()
        results.keep(name, part)
        for log in folder.glob(f"{name}*.log"):
            shutil.copy(log, out.with_name(f"{out.stem}.{log.name}"))
        lines = [row["line"] for row in part["rows"]]
        print(f"[{name}: {part['seconds']} s]", *lines, *part["faults"], sep="\n  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_sglang.json"))
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, also if done")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--wheels", type=Path, help="only fetch wheels into this folder")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.wheels:
        fetch_wheels(options.wheels, WHEELS)
        return
    if options.part:
        one_part(options.part, options.out, tiny=options.tiny, program=PROGRAM)
        return
    import torch

    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise SystemExit("bench.gpu_sglang needs a GPU; --tiny runs its code on a CPU")
    results = Results([options.out, TEMPORARY / "sglang.json"], machine(options.tiny))
    names = options.only or [name for name in PARTS if not results.done(name)]
    try:
        run_all(names, results, options.out, options.tiny)
    finally:
        results.show()
    if any(part["faults"] for part in results.all["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
