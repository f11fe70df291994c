"""What the ops must cost at least on a GPU, from bytes, FLOPs, launches and dependent steps: arithmetic, not timing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops, reference


@dataclass(frozen=True)
class Rates:
    """What a machine does per second.

    Attributes:
        basis: ``"measured"``, ``"measured on a CPU"`` or ``"modelled"``.
        copy: bytes a second, read and written.
        product: FLOPs a second of half-precision matmul.
        launch: seconds of an empty launch.
        step: seconds of a dependent step of one program (a reduction over it and a read from L2).
        stream: bytes a second that one program reads.
        assumed: which of these nothing here measures: they are an H200's, whatever the machine.
    """

    basis: str
    copy: float
    product: float
    launch: float
    step: float = 1.3e-6
    stream: float = 80e9
    assumed: str = "step, stream"


H200 = Rates("modelled", 4.3e12, 790e12, 4e-6)
"""Rates stated for an H200; what the table of floors is made with where there is no GPU."""


@dataclass(frozen=True)
class Rival:
    """A published kernel for the same thing, timed beside ours where its package is installed.

    Attributes:
        module: that is imported.
        package: that has it.
        run: calls it with the module and the inputs of the case; gives what the op gives.
        devices: types of devices that it runs on.
    """

    module: str
    package: str
    run: Callable[..., Any]
    devices: tuple[str, ...] = ("cuda",)

    def installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str | None:
        """Of the package; None where it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: name of the public function.
        what: the size in words.
        batch: pictures.
        make: makes its inputs: (device, dtype) to arguments.
        run: calls the op of a module (`vlmtok.kernels.ops` or `reference`) on them.
        bytes: that must be read and written, each once.
        flops: of its matmuls.
        launches: of the Triton path.
        chain: (dependent steps, bytes that each reads), for an op whose steps wait for each other.
        unrolls: whether torch.compile would unroll a long loop (it is not asked to).
        rivals: published kernels for it.
        dtype: of its inputs, where it has one of its own.
    """

    op: str
    what: str
    batch: int
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    run: Callable[..., Any]
    bytes: int
    flops: int
    launches: int
    chain: tuple[int, int] = (0, 0)
    unrolls: bool = False
    rivals: tuple[Rival, ...] = ()
    dtype: torch.dtype | None = None

    def floor(self, rates: Rates) -> float:
        """Seconds that no implementation undercuts."""
        steps, size = self.chain
        waiting = steps * (rates.step + size / rates.stream)
        return max(self.bytes / rates.copy, self.flops / rates.product, self.launches * rates.launch, waiting)

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
        """What is timed, on the same inputs.

        Returns:
            ``"ours"``, the public op; ``"eager"``, its definition; the installed rivals that run there, by module.
        """
        inputs = self.make(device, self.dtype or dtype)
        found = {"ours": lambda: self.run(ops, *inputs), "eager": lambda: self.run(reference, *inputs)}
        for rival in self.rivals:
            if device.type in rival.devices and rival.installed():
                module = importlib.import_module(rival.module)
                found[rival.module] = lambda rival=rival, module=module: rival.run(module, *inputs)  # type: ignore[misc]
        return found
