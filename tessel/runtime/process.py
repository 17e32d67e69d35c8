"""The process group that PyTorch's engine wants, even where one process works alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def mesh_of_one(device: torch.device) -> Iterator[DeviceMesh]:
    """A one-dimensional mesh that holds this process alone. No socket is opened."""
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh(device.type, [0])
    finally:
        distributed.destroy_process_group()
