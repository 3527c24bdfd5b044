"""The device of this process, and the processes that torchrun starts."""

import os
import re
import socket
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch

from echofocus_core.base.console import UserError, printable


def from_environment(name, default, least=0):
    """An environment variable of torchrun or SLURM, an integer >= `least`. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"the environment variable {name} is {printable(text)[:40]!r}, but must be a whole "
            f"number from {least}; torchrun or SLURM sets it; unset {name} to run without them"
        )
    return int(text)


def rank_and_size(rank_name, size_name):
    """(rank, size) from two environment variables. Raises UserError unless rank < size."""
    size = from_environment(size_name, 1, least=1)
    rank = from_environment(rank_name, 0)
    if rank >= size or (size > 1 and rank_name not in os.environ):
        raise UserError(
            f"the environment variable {size_name} is {size} and {rank_name} is "
            f"{os.environ.get(rank_name, 'missing')}; unset both to run one process"
        )
    return rank, size


DEVICES = ("cpu", "cuda", "mps", "xpu")  # the supported types


def pick_device(name=""):
    """`--device` as a torch.device; by default a CUDA device (by local rank), or the CPU."""
    if not name and torch.cuda.is_available():
        name = f"cuda:{from_environment('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    try:
        device = torch.device(name or "cpu")
        if device.type not in DEVICES:
            raise NotImplementedError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not available here; use --device cpu") from error
    return device


@contextmanager
def exact_convolutions():
    """Disable TF32 in the block: its 10 bits of mantissa in GPU convolutions would change
    embeddings by a thousandth."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class World:
    """The processes that train together, started by torchrun; this one alone by default."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor):
        """Replace a tensor by its sum over all processes, and return it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_each(self, tensors):
        """The sum of each tensor over all processes."""
        if self.size == 1:
            return tensors
        flat = self.sum(torch.cat([x.flatten() for x in tensors]))
        parts = flat.split([x.numel() for x in tensors])
        return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]

    def gather(self, value):
        """Every process's `value`, in order of rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def join_world(device, what):
    """Yield the World of this process; in the block, only the first process prints.

    what: what the processes do together, for the message. Raises UserError.
    """
    world = World(*rank_and_size("RANK", "WORLD_SIZE"))
    if world.size == 1:
        yield world
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from_environment("MASTER_PORT", 29500)
    print(f"process {world.rank} of {world.size} is waiting for the other processes")
    try:
        socket.getaddrinfo(os.environ.get("MASTER_ADDR", "localhost"), None)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store_of_attempt(), rank=world.rank, world_size=world.size,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:  # DistError is a RuntimeError
        raise UserError(
            f"the {world.size} processes cannot connect "
            f"({printable(error).splitlines()[0][:150]}); start them with torchrun, or unset "
            "WORLD_SIZE and RANK to run one process"
        ) from error
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world.rank else sys.stdout):
        print(f"{world.size} processes {what}")
        yield world
    torch.distributed.destroy_process_group()


def store_of_attempt():
    """torchrun's store with a prefix for each restart; None for processes started otherwise.

    The store outlives a restart and still has the addresses of the processes that died, to which a
    new process would try to connect.
    """
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    host, port = os.environ.get("MASTER_ADDR", "localhost"), from_environment("MASTER_PORT", 29500)
    store = torch.distributed.TCPStore(host, port, is_master=False)
    store.set_timeout(timedelta(minutes=30))  # one process may decode longer than the others
    return torch.distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
