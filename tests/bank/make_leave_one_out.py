"""Make the bank of leave-one-out figures of random real subsets, that the null rates are resampled from.

    python -m tests.bank.make_leave_one_out

Real digits only: the agreement between initialisations of each point's influence, and where it falls. The subsets of a
group share their initialisations, as the sets of a study do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distillens.analyses.pointwise.leave_one_out import LeaveOneOut
from distillens.core.rng import Key
from distillens.core.storage import write_tensors
from distillens.data import load
from distillens.sessions import session
from tests.analyses.by_hand import subsets_by_number

GROUPS, TOGETHER, IPC = 8, 6, 1
PATH = Path(__file__).with_name("leave_one_out.safetensors")


def main() -> None:
    real = load("digits")
    key = Key(2025, ("leave one out bank",))
    agreement, shared = [], []
    with session(real) as runs:
        for g in range(GROUPS):
            sets = subsets_by_number(key.fold("subset", g), real, TOGETHER, IPC)
            found = LeaveOneOut.defaults(real.train)(sets, real, runs, key=key.fold("net", g))
            agreement.append(torch.stack([found.agreement[str(s)] for s in range(TOGETHER)]))
            shared.append(torch.stack([found.shared[str(s)] for s in range(TOGETHER)]))
    tensors = {"agreement": torch.stack(agreement), "shared": torch.stack(shared)}
    write_tensors(PATH, {name: value.float() for name, value in tensors.items()})


if __name__ == "__main__":
    main()
