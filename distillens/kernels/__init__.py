"""Compiled kernels for what a small network spends its time on; plain PyTorch where there is no compiler."""
