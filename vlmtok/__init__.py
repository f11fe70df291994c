"""vlmtok: prune and merge the visual tokens of vision-language models that already exist.

``import vlmtok`` imports torch and nothing else: timm, open_clip, transformers and triton come in when a model or a
kernel needs them. What is public is a table in `surface`; everything else may move.
"""

from __future__ import annotations

import os as _os
import sys as _sys
from typing import TYPE_CHECKING

# An uninstalled checkout keeps the adapters beside the package; setuptools maps them into it on installation.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "adapters")) and _os.path.isfile(
    _os.path.join(_root, "adapters", "base.py")
):
    __path__.append(_root)

if TYPE_CHECKING:
    from . import adapters as adapters
    from . import errors as errors
    from . import kernels as kernels
    from . import lab as lab
    from . import loading as loading
    from . import serving as serving
    from .compression import Compression as Compression
    from .compression import compress as compress
    from .compression import remove as remove
    from .core.layer_profile import LayerProfile as LayerProfile
    from .core.method import Method as Method
    from .core.reduction import Reduction as Reduction
    from .core.registry import create_method as create_method
    from .core.registry import list_methods as list_methods
    from .core.registry import method_class as method_class
    from .core.registry import register_method as register_method
    from .core.settings import keep_count as keep_count
    from .core.site import Counts as Counts
    from .core.site import Layout as Layout
    from .core.site import Site as Site
    from .core.site import StageLayout as StageLayout
    from .core.spec import parse_methods as parse_methods
    from .core.trace import Trace as Trace
    from .core.view import TokenView as TokenView
    from .cost.report import Report as Report
    from .cost.reports import Reports as Reports
    from .evaluation.engine import evaluate as evaluate
    from .evaluation.recommend import Recommendation as Recommendation
    from .evaluation.recommend import recommend as recommend
    from .evaluation.table import Evaluation as Evaluation
    from .forecast.budget import budget as budget
    from .forecast.estimate import estimate as estimate
    from .lab.calibrate import calibrate as calibrate
    from .lab.compare import compare as compare
    from .lab.comparison import Comparison as Comparison
    from .lab.explore import explore as explore
    from .lab.matrix import Matrix as Matrix
    from .lab.matrix import matrix as matrix
    from .lab.overlay import overlay as overlay
    from .lab.sweep import Sweep as Sweep
    from .lab.sweep import sweep as sweep
    from .lab.zero_shot import zero_shot as zero_shot
    from .loading import load as load
    from .mergers.aim import AIM as AIM
    from .mergers.averagepool import AveragePool as AveragePool
    from .mergers.crossget import CrossGET as CrossGET
    from .mergers.ems_style import EMSStyle as EMSStyle
    from .mergers.pitome import PiToMe as PiToMe
    from .mergers.prumerge import PruMerge as PruMerge
    from .mergers.recoverable import Recoverable as Recoverable
    from .mergers.sparsevlm import SparseVLM as SparseVLM
    from .mergers.tca import TCA as TCA
    from .mergers.tome import ToMe as ToMe
    from .mergers.visionzip import VisionZip as VisionZip
    from .pruners.cdpruner import CDPruner as CDPruner
    from .pruners.corematching import CoreMatching as CoreMatching
    from .pruners.dart import DART as DART
    from .pruners.divprune import DivPrune as DivPrune
    from .pruners.evs import EVS as EVS
    from .pruners.fastervlm import FasterVLM as FasterVLM
    from .pruners.fastv import FastV as FastV
    from .pruners.grid import UniformGrid as UniformGrid
    from .pruners.hiprune import HiPrune as HiPrune
    from .pruners.holov import HoloV as HoloV
    from .pruners.ima import IMA as IMA
    from .pruners.kv_norm import KVNorm as KVNorm
    from .pruners.kv_random import KVRandom as KVRandom
    from .pruners.learned import Learned as Learned
    from .pruners.mmtok import MMTok as MMTok
    from .pruners.prefixkv import PrefixKV as PrefixKV
    from .pruners.pyramiddrop import PyramidDrop as PyramidDrop
    from .pruners.random import Random as Random
    from .pruners.scope import SCOPE as SCOPE
    from .pruners.snapkv import SnapKV as SnapKV
    from .pruners.streaming import Streaming as Streaming
    from .pruners.todre import ToDRE as ToDRE
    from .pruners.tokencorr import TokenCorr as TokenCorr
    from .pruners.transprune import TransPrune as TransPrune
    from .pruners.vidcom2 import VidCom2 as VidCom2
    from .pruners.vispruner import VisPruner as VisPruner
    from .version import __version__ as __version__
else:  # what type checkers do not see: the same names, on first use
    import importlib as _importlib

    from . import moved as _moved
    from .surface import HOME as _HOME
    from .version import __version__  # noqa: F401

    _sys.meta_path.insert(0, _moved.Finder())  # before folders of an older checkout

    def _method_classes() -> dict:
        from .core.registry import list_methods, method_class

        return {method_class(name).__name__: method_class(name) for name in list_methods()}

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return __dir__()
        if name in _HOME:
            module = _importlib.import_module(f".{_HOME[name]}", __name__)
            value = module if _HOME[name] == name else getattr(module, name)
        elif name in _moved.MODULES:
            value = _importlib.import_module(f".{name}", __name__)
        else:  # a class; a name in lower case may be asked for by the import system, which then looks for a file
            classes = _method_classes() if name[:1].isupper() else {}
            if name not in classes:
                from .errors import hint

                near = "" if name.startswith("_") else hint(name, [*_HOME, *classes])
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
            value = classes[name]
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*_HOME, "__version__", *_method_classes()})
