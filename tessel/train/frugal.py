"""An optimizer whose state is kept in host memory, or in less than fp32.

The update is torch's own, called for one parameter after the other. On the CPU it is bitwise that of
torch's optimizers, as long as the state is fp32.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from tessel.checkpoint.tiles import local_of
from tessel.config.memory import Memory
from tessel.config.run import Optimizer as OptimizerConfig
from tessel.runtime.host import Copy, HostCopies
from tessel.train.state import Blockwise, State, local_state, parts_of, read, write

# What has fewer elements keeps fp32 where 8 bits are asked for: norms and biases, a thousandth of a model.
SMALLEST_IN_8BIT = 4096
# Parameters whose copies are under way while one is updated.
_LOOKAHEAD = 2

# device: state and update where the parameter is. swap: state in host memory, update where the parameter is.
# host: both on the CPU.
Place = Literal["device", "swap", "host"]


def is_needed(memory: Memory) -> bool:
    """Whether a run asks for what torch's own optimizers don't do."""
    in_fp32 = memory.exp_avg_dtype == memory.exp_avg_sq_dtype == "fp32"
    return memory.optimizer_cpu_offload or memory.swap_optimizer or not in_fp32


def notes(memory: Memory, device: torch.device, optimizer: torch.optim.Optimizer) -> list[str]:
    """Lines for the start of a run: where state lies, and what saves nothing on this device."""
    lines = []
    if isinstance(optimizer, FrugalOptimizer):
        here, in_host_memory = optimizer.state_bytes()
        lines.append(
            f"optimizer state: {here / 2**20:,.1f} MiB on {device.type}, {in_host_memory / 2**20:,.1f} in host memory"
        )
    moved = {
        "--cpu-offloading-num-layers": memory.cpu_offloading_num_layers is not None,
        "--swap-attention": memory.swap_attention,
        "--optimizer-cpu-offload": memory.optimizer_cpu_offload,
        "--swap-optimizer": memory.swap_optimizer,
    }
    idle = [flag for flag, asked in moved.items() if asked]
    if device.type == "cpu" and idle:
        lines.append(f"{' '.join(idle)}: on the CPU everything is in host memory already, so this saves nothing")
    return lines


def conversions(saved: Mapping[str, Any], memory: Memory) -> list[str]:
    """Lines on state that is kept in another precision than the one of the run it was saved by.

    `saved`: that run's `Memory` section, as its configuration was written; without entries, fp32.
    """
    return [
        f"{name}: saved by a run that kept it in {before}, and kept in {now} from here on"
        for name in ("exp_avg", "exp_avg_sq")
        if (before := saved.get(f"{name}_dtype", "fp32")) != (now := getattr(memory, f"{name}_dtype"))
    ]


@dataclass(frozen=True)
class _Job:
    """The update of one parameter."""

    name: str
    group: dict[str, Any]
    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor
    states: dict[str, State]


class FrugalOptimizer(torch.optim.Optimizer):
    """AdamW, or SGD with momentum, as `build_optimizer` has them, with state that is elsewhere or smaller.

    State is there from the start, under torch's names: a tensor in fp32 or bf16, or `Blockwise` for 8 bits.
    Parameters may be DTensors: each process updates its own part.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, memory: Memory) -> None:
        defaults = {
            "lr": config.lr or 0.0,
            "weight_decay": config.weight_decay,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_eps,
            "momentum": config.sgd_momentum,
        }
        super().__init__(groups, defaults)
        self._memory = memory
        self._is_adam = config.optimizer == "adam"
        # A pipeline stage may have no parameters.
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        device = next((parameter.device for parameter in parameters), torch.device("cpu"))
        self._weights = HostCopies(device, pin=not memory.no_pin_cpu_params)
        self._gradients = HostCopies(device, pin=not memory.no_pin_cpu_grads)
        self._places = self._chosen_places()
        self._fused = {kind: _has_fused(torch.device(kind), self._is_adam) for kind in {"cpu", device.type}}
        for parameter, place in self._places.items():
            self._allocate(parameter, place)

    def _chosen_places(self) -> dict[nn.Parameter, Place]:
        """Offloaded are parameters in their order, as many as fit in the fraction of all elements."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self._memory.optimizer_cpu_offload:
            return dict.fromkeys(parameters, "swap" if self._memory.swap_optimizer else "device")
        room = self._memory.optimizer_offload_fraction * sum(parameter.numel() for parameter in parameters)
        places: dict[nn.Parameter, Place] = {}
        for parameter in parameters:
            fits = parameter.numel() <= room
            places[parameter] = "host" if fits else "device"
            room -= parameter.numel() if fits else 0
        return places

    def _allocate(self, parameter: nn.Parameter, place: Place) -> None:
        device = parameter.device if place == "device" else torch.device("cpu")
        pin = self._weights.pin and place != "device"
        state = self.state[parameter]
        if not self._is_adam:
            if self.defaults["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter, device=device, pin_memory=pin)
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name, dtype in (("exp_avg", self._memory.exp_avg_dtype), ("exp_avg_sq", self._memory.exp_avg_sq_dtype)):
            if dtype == "8bit" and local_of(parameter).numel() >= SMALLEST_IN_8BIT:
                state[name] = Blockwise.zeros(parameter, name == "exp_avg", device, pin)
            else:
                held = torch.bfloat16 if dtype == "bf16" else torch.float32
                state[name] = torch.zeros_like(parameter, dtype=held, device=device, pin_memory=pin)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        jobs: dict[Place, list[_Job]] = {"device": [], "swap": [], "host": []}
        for job in self._jobs():
            jobs[self._places[job.parameter]].append(job)
        # The device works on its own while the CPU does.
        for job in jobs["device"]:
            self._update(job, job.weight, job.gradient, job.states)
        self._step_swapped(jobs["swap"])
        self._step_on_host(jobs["host"])

    def _jobs(self) -> Iterator[_Job]:
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                kept = {name: value for name, value in self.state[parameter].items() if name != "step"}
                states = {name: local_state(value, name == "exp_avg") for name, value in kept.items()}
                yield _Job(name, group, parameter, local_of(parameter), local_of(parameter.grad), states)

    def _step_swapped(self, jobs: Sequence[_Job]) -> None:
        """Bring each state to the device, update there, and send it back."""
        waiting, fetched = deque(jobs), deque[dict[str, list[Copy]]]()
        last: Copy | None = None
        for job in jobs:
            while waiting and len(fetched) < _LOOKAHEAD:
                states = waiting.popleft().states
                fetched.append({name: [self._weights.up(t) for t in s.tensors] for name, s in states.items()})
            here = fetched.popleft()
            states = {name: s.elsewhere([copy.on_device() for copy in here[name]]) for name, s in job.states.items()}
            self._update(job, job.weight, job.gradient, states)
            for name, state in job.states.items():
                for target, source in zip(state.tensors, states[name].tensors, strict=True):
                    last = self._weights.into(target, source)
        if last is not None:
            # One stream: with the last copy all are there, for a checkpoint to read.
            last.on_host()

    def _step_on_host(self, jobs: Sequence[_Job]) -> None:
        """Bring gradients and weights to the CPU, update there, and send the weights back."""
        overlap = self._memory.overlap_cpu_optimizer_d2h_h2d
        waiting, fetched = deque(jobs), deque[tuple[Copy, Copy]]()
        for job in jobs:
            while waiting and len(fetched) < (1 + _LOOKAHEAD if overlap else 1):
                following = waiting.popleft()
                fetched.append(self._brought_down(following))
            weight, gradient = (copy.on_host() for copy in fetched.popleft())
            self._update(job, weight, gradient, job.states)
            sent = self._weights.into(job.weight, weight)
            if not overlap:
                sent.on_host()
        self._weights.wait()

    def _brought_down(self, job: _Job) -> tuple[Copy, Copy]:
        if job.weight.device.type == "cpu":
            return Copy(job.weight), Copy(job.gradient)
        return self._weights.down(job.weight), self._gradients.down(job.gradient)

    def _update(self, job: _Job, weight: Tensor, gradient: Tensor, states: dict[str, State]) -> None:
        group, fused = job.group, self._fused[weight.device.type]
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"], "maximize": False, "fused": fused}
        if not self._is_adam:
            momentum = [states["momentum_buffer"].values] if states else [None]
            sgd([weight], [gradient], momentum, momentum=group["momentum"], dampening=0.0, nesterov=False, **common)  # type: ignore[arg-type]
            return
        step = self.state[job.parameter]["step"]
        beta1, beta2 = group["betas"]
        common |= {"amsgrad": False, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}

        def adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
            # A fused kernel reads the step where the parameter is; the others, on the CPU.
            before = step.to(w.device, copy=True) if fused else step.clone()
            adamw([w], [g], [m], [v], [], [before], **common)

        first, second = states["exp_avg"], states["exp_avg_sq"]
        if first.values.dtype is second.values.dtype is torch.float32:
            adam(weight, gradient, first.values, second.values)
        else:
            # The same numbers are drawn again where a run goes on, and for a tied embedding on both of its stages.
            seed = (int(step) << 32) + zlib.crc32(job.name.encode())
            generator = torch.Generator(weight.device).manual_seed(seed)
            for part in parts_of(weight.numel()):
                m, v = read(first, part), read(second, part)
                adam(weight.view(-1)[part], gradient.reshape(-1)[part], m, v)
                write(first, part, m)
                write(second, part, v, generator)
        step += 1

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of this process's state on the device, and in host memory; on the CPU they are all the first."""
        on_device = in_host_memory = 0
        for parameter, place in self._places.items():
            for name, kept in self.state[parameter].items():
                if name != "step":
                    num_bytes = sum(tensor.nbytes for tensor in local_state(kept, True).tensors)
                    is_here = place == "device" or parameter.device.type == "cpu"
                    on_device += num_bytes if is_here else 0
                    in_host_memory += 0 if is_here else num_bytes
        return on_device, in_host_memory


def _has_fused(device: torch.device, is_adam: bool) -> bool:
    """Whether torch has a fused update for a kind of device."""
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW if is_adam else torch.optim.SGD
    try:
        kind([torch.zeros(1, device=device)], lr=0.0, fused=True)  # type: ignore[call-arg]
    except RuntimeError:
        return False
    return True
