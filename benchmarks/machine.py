"""Times, memory, and the upper bounds of this machine's speed."""

import os
import platform
import resource
import time

import torch

from echofocus_core.video.panecho import can_pack


def describe(device):
    """One line: processor or GPU, cores, torch."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(x.split(":")[1].strip() for x in f if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if str(device).startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def timed(function, device, repeats=1):
    """Median seconds of `function()`, including the work on the device."""
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def synchronise(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(device, dtype, size=2048):
    """FLOP/s of a large square matrix product, the best of several; on a CPU by MKL or oneDNN."""
    if str(device).startswith("cuda"):
        size = 8192
    elif dtype == torch.bfloat16 and not can_pack(dtype):
        size = 256  # emulated: a thousandth of the rate
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = [lambda: torch.mm(a, b)]
    if str(device) == "cpu" and can_pack(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    best = min(timed(product, device) for product in products for _ in range(6))
    return 2 * size**3 / best


def peak_memory(device):
    """Peak memory in bytes, of the GPU or of this process."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
