"""``python -m vlmtok.kernels.bench``."""

from .measuring import main

raise SystemExit(main())
