"""Copies between a device and host memory, beside the computation where the device has streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Copy:
    """A copy that may still be under way."""

    tensor: Tensor
    done: torch.Event | None = None

    def on_host(self) -> Tensor:
        """The copy, for the CPU to read: waits until it is there."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensor

    def on_device(self) -> Tensor:
        """The copy, for the device's present stream to read: makes that wait, not the CPU."""
        if self.done is not None:
            stream = torch.accelerator.current_stream(self.tensor.device)
            stream.wait_event(self.done)
            self.tensor.record_stream(stream)
        return self.tensor


class HostCopies:
    """Copies to and from a device, on a stream of their own. On the CPU, where there is none, they are done at once.

    `pin`: take page-locked host memory, which alone is copied while the device computes.
    """

    def __init__(self, device: torch.device, pin: bool = True) -> None:
        self.device = device
        self.pin = pin and device.type != "cpu"
        self._stream = torch.Stream(device) if device.type != "cpu" else None

    def down(self, source: Tensor) -> Copy:
        """Host memory's copy of a tensor of the device; the tensor may be freed at once."""
        if self._stream is None:
            return Copy(source.clone())
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        host = torch.empty_like(source, device="cpu", pin_memory=self.pin)
        with self._stream:
            host.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        source.record_stream(self._stream)
        return Copy(host, done)

    def up(self, source: Tensor) -> Copy:
        """The device's copy of a tensor in host memory; on the CPU that tensor itself."""
        if self._stream is None:
            return Copy(source)
        with self._stream:
            here = torch.empty_like(source, device=self.device)
            here.copy_(source, non_blocking=True)
            return Copy(here, self._stream.record_event())

    def into(self, target: Tensor, source: Tensor) -> Copy:
        """Overwrite a tensor, on the device or in host memory, after what the device was given before this call."""
        if self._stream is None:
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
            return Copy(target)
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._stream:
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        for tensor in (target, source):
            if tensor.device.type != "cpu":
                tensor.record_stream(self._stream)
        return Copy(target, done)

    def wait(self) -> None:
        """Make the device's present stream wait for all copies so far."""
        if self._stream is not None:
            torch.accelerator.current_stream(self.device).wait_stream(self._stream)
