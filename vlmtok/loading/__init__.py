"""Models and pictures by the names that users type: folders, hub ids, ``timm:NAME``, ``open_clip:NAME[:PRETRAINED]``.

Libraries are imported when a name asks for them. Whatever goes wrong on the way (no such name, no network, a file that
is no picture) is a `LoadError` of one line.
"""

from .devices import DTYPES, pick_device, pick_dtype
from .models import Loaded, configured, load, skeleton
from .names import DATA, EMBEDDED, SHIPPED
from .pictures import Sample, check_writable, open_picture, samples
from .problems import LoadError, line_of, quiet

__all__ = [
    "DATA",
    "DTYPES",
    "EMBEDDED",
    "SHIPPED",
    "LoadError",
    "Loaded",
    "Sample",
    "check_writable",
    "configured",
    "line_of",
    "load",
    "open_picture",
    "pick_device",
    "pick_dtype",
    "quiet",
    "samples",
    "skeleton",
]
