"""What one card does, by one command: kernels and their rivals, launches, towers, language models, and a page of it.

``vlmtok bench --all FOLDER``. Each part is a file of rows, so that a run that is cut off keeps what it has, and parts
can be measured one after the other.
"""

from .measuring import PARTS, Found, measure_card

__all__ = ["PARTS", "Found", "measure_card"]
