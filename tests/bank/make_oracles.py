"""Put dattri's scores on the problems of tests/reference/test_attribution_oracles.py on record, for machines without it.

pip install dattri==0.3.0
python -m tests.bank.make_oracles
"""

from __future__ import annotations

from distillens.core.storage import write_tensors
from distillens.data import load
from tests.reference.test_attribution_oracles import ASKED, BANK, NETS, case


def main() -> None:
    problems = [case(load("digits"), name) for name in NETS]
    found = {f"{one.name}: {what}": ask(one).detach() for one in problems for what, ask in ASKED.items()}
    write_tensors(BANK, {name: scores.float().contiguous() for name, scores in found.items()})


if __name__ == "__main__":
    main()
