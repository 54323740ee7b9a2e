"""What a run ran on, for the report."""

import os
import platform
from pathlib import Path
from typing import TypedDict

import psutil


class Hardware(TypedDict):
    cpu: str
    cores: int
    memory_bytes: int


def describe_hardware() -> Hardware:
    """Processor name, cores and memory of this machine."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {"cpu": name, "cores": os.cpu_count() or 1, "memory_bytes": psutil.virtual_memory().total}
