"""Where a suite's command runs on this machine."""

from __future__ import annotations

from tessel.drop_in.commands import Command


def device_count() -> int:
    """Accelerators of this machine; 0 where there is the CPU alone."""
    import torch

    from tessel.runtime.device import load_plugins

    load_plugins()
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def placed(command: Command) -> tuple[Command, list[str]]:
    """`command` on the CPU where it starts more processes than there are devices, and a remark that says so."""
    number = command.arguments.value("--nproc-per-node")
    if number is None or not number.isdecimal() or command.arguments.has("--device"):
        return command, []
    devices = device_count()
    if int(number) <= devices:
        return command, []
    remark = f"{number} process{'es' * (number != '1')}, and {devices or 'no'} devices: on the CPU"
    return Command(command.verb, command.arguments.plus("--device", "cpu")), [remark]
