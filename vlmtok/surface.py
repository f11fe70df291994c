"""The public names of the package and where they live; the methods' classes are public too, by the registry."""

HOME: dict[str, str] = {
    "adapters": "adapters",
    "errors": "errors",
    "kernels": "kernels",
    "lab": "lab",
    "loading": "loading",
    "serving": "serving",
    # compress
    "Compression": "compression",
    "compress": "compression",
    "remove": "compression",
    "Trace": "core.trace",
    # what it costs
    "Report": "cost.report",
    "budget": "forecast.budget",
    "estimate": "forecast.estimate",
    # what to take
    "Evaluation": "evaluation.table",
    "evaluate": "evaluation.engine",
    "Recommendation": "evaluation.recommend",
    "recommend": "evaluation.recommend",
    # try and show
    "Comparison": "lab.comparison",
    "LayerProfile": "core.layer_profile",
    "Matrix": "lab.matrix",
    "calibrate": "lab.calibrate",
    "compare": "lab.compare",
    "explore": "lab.explore",
    "load": "loading",
    "matrix": "lab.matrix",
    "Reports": "cost.reports",
    "Sweep": "lab.sweep",
    "overlay": "lab.overlay",
    "sweep": "lab.sweep",
    "zero_shot": "lab.zero_shot",
    # a method of one's own
    "Counts": "core.site",
    "Layout": "core.site",
    "Method": "core.method",
    "Reduction": "core.reduction",
    "Site": "core.site",
    "StageLayout": "core.site",
    "TokenView": "core.view",
    "create_method": "core.registry",
    "keep_count": "core.settings",
    "list_methods": "core.registry",
    "method_class": "core.registry",
    "parse_methods": "core.spec",
    "register_method": "core.registry",
}
"""Name to module, below ``vlmtok``; the version and the methods' classes come by themselves."""
