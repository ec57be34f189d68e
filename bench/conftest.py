"""What a results file says of the machine, besides what pytest-benchmark finds out."""

from typing import Any

import torch

import dafl_fast


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = dafl_fast.build_info()["isa"]
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
