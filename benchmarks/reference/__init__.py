"""The plain way to do each work: what the package's speed is a ratio to.

Modules, ``torch.optim`` and loops as in the papers' authors' code, with every default of PyTorch. Nothing here comes
from the package; ``tests/benchmarks`` holds that both sides compute the same.
"""
