"""Compiles the kernels ahead of time for GPUs that are not there, and reads what they use.

The launchers run on meta tensors with the launch captured, so that what is compiled is what would be launched:
same arguments, same constants, same specialisation. Run as a script in a process without TRITON_INTERPRET; prints JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from count_ops import Launch, capture
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def build(launch: Launch, target: GPUTarget) -> Any:
    """Compiles a launch with the specialisation that Triton would choose."""
    kernel = launch.kernel
    names = kernel.arg_names
    plain = set(getattr(kernel, "do_not_specialize", None) or ())
    values = dict(zip(names, launch.args))
    constants, signature, attrs = dict(launch.constants), {}, {}
    for at, name in enumerate(names):
        value = values.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1 and name not in plain):
            constants.setdefault(name, value)
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attrs[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                attrs[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    warps = min(launch.warps, 16) if target.backend == "hip" else launch.warps
    options = {"num_warps": warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def measure(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers, spills and shared memory in bytes, and the instructions of the longest loop."""
    result: dict[str, Any] = {"shared": compiled.metadata.shared}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        result["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return result
    nvidia = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(nvidia.cuobjdump.path, "-res-usage", file.name)
        result["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        result["loop"] = _longest_loop(_run(nvidia.cuobjdump.path, "-sass", file.name))
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    result["spills"] = _spills(compiled.asm["ptx"], target) if stack else 0
    return result


def _spills(ptx: str, target: GPUTarget) -> int:
    """Bytes stored and loaded because registers ran out; a stack may have other reasons."""
    nvidia = triton.knobs.nvidia
    tool = nvidia.ptxas_blackwell if target.arch >= 90 else nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = re.search(r"\.target (\w+)", ptx)[1]
        told = _run(tool.path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null")
    return sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told).groups()))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _longest_loop(sass: str) -> int:
    """Instructions between a backward branch and its target, the most there are."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    places = {int(at, 16): i for i, (at, _, _) in enumerate(found)}
    longest = 0
    for i, (at, op, rest) in enumerate(found):
        goal = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if goal and int(goal[1], 16) < int(at, 16):
            longest = max(longest, i - places.get(int(goal[1], 16), i) + 1)
    return longest


def report(targets: list[str], every: bool) -> dict[str, dict[str, Any]]:
    """`"case: kernel @target"` to what it uses; a kernel that several cases share is compiled once."""
    from aot_cases import TIGHT, cases

    table, done = {}, set()
    for case, (_, call) in cases().items():
        if not every and case not in TIGHT:
            continue
        for launch in capture(call):
            if launch.kernel.__name__ == "_scale_kernel" and not case.startswith("row_scale"):
                continue  # it has cases of its own
            ones = [value is None or value == 1 for value in launch.args if not isinstance(value, torch.Tensor)]
            dtypes = [value.dtype for value in launch.args if isinstance(value, torch.Tensor)]
            key = repr((launch.kernel.__name__, sorted(launch.constants.items()), launch.warps, ones, dtypes))
            for target in targets:
                if (key, target) not in done:
                    done.add((key, target))
                    name = f"{case}: {launch.kernel.__name__.strip('_').removesuffix('_kernel')} @{target}"
                    table[name] = measure(build(launch, TARGETS[target]), TARGETS[target])
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the kernels and print what they use, as JSON.")
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--every", action="store_true", help="every row of the tile table, not the tight ones alone")
    arguments = parser.parse_args()
    lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in report(arguments.targets, arguments.every).items())
    print("{\n" + ",\n".join([f'  "triton": "{triton.__version__}"', *lines]) + "\n}")
