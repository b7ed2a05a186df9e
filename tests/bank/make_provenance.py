"""Make the bank of records of donors that the null rates are resampled from.

    python tests/bank/make_provenance.py

Real digits, distilled by distribution matching: parts [replicates, 2, points a class, n] and batches met [replicates, 2, n].
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens import pipeline
from distillens.core.storage import write_tensors
from distillens.data import load

REPLICATES, IPC, SEED = 10, 2, 2025
PATH = Path(__file__).with_name("provenance.safetensors")


def main() -> None:
    real = load("digits")
    settings = ["donors=true", "steps=100", "net.depth=2", "net.width=8"]
    records = [
        pipeline.distill("dm", real, ipc=IPC, seed=SEED, replicate=r, settings=settings, threads=1).donors
        for r in range(REPLICATES)
    ]
    parts = torch.stack([record.parts for record in records if record is not None])
    met = torch.stack([record.met for record in records if record is not None])
    write_tensors(PATH, {"parts": parts.half(), "met": met.to(torch.uint8)})


if __name__ == "__main__":
    main()
