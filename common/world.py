"""The device of this process, and the processes that torchrun starts."""

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch

from common.console import UserError


def pick_device(name=""):
    """`--device` as a torch.device; by default CUDA (torchrun's local rank says which), or CPU."""
    import torch

    if not name and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    # fp32 is fp32 on a GPU too: torch would run convolutions in TF32, with 10 bits of mantissa, and
    # embeddings would differ from a CPU's by a thousandth.
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not to be had here; cpu always is") from error
    return device


@dataclass
class World:
    """The processes that train together, started by torchrun; this one alone by default."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor):
        """A tensor's sum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, thing):
        """Every process's `thing`, in order of rank."""
        things = [thing]
        if self.size > 1:
            things = [None] * self.size
            torch.distributed.all_gather_object(things, thing)
        return things


def join_world(device):
    """The World of this process; those that are not the first fall silent on standard output."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(int(os.environ["RANK"]), size)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        **(meeting_point(world) if "TORCHELASTIC_RESTART_COUNT" in os.environ else {}),
    )
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    else:
        print(f"{size} processes share each optimiser step")
    return world


def meeting_point(world):
    """Where torchrun's processes find each other: a store of the first process's own.

    torchrun's store outlives a restart and still holds the addresses of the processes that died;
    whoever reads such an address fails to connect and asks again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = torch.distributed.TCPStore(host, port, is_master=False)
    if world.rank == 0:
        store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        board.set("echofocus", str(store.port))
        return {"store": store, "rank": 0, "world_size": world.size}
    for _ in range(100):
        try:
            address = host, int(board.get("echofocus"))
            store = torch.distributed.TCPStore(
                *address, is_master=False, timeout=timedelta(seconds=5)
            )
        except torch.distributed.DistError:
            time.sleep(0.5)
            continue
        store.set_timeout(timedelta(minutes=30))
        return {"store": store, "rank": world.rank, "world_size": world.size}
    raise UserError(f"process {world.rank} cannot reach the first process at {host}")
