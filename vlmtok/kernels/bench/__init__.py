"""The benchmark of the kernels: ``python -m vlmtok.kernels.bench``."""
