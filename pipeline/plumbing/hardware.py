"""What a run ran on, for the report."""

import os
import platform
from pathlib import Path

import psutil
from pydantic import PositiveInt

from pipeline.plumbing.records import Record


class Hardware(Record):
    cpu: str
    cores: PositiveInt
    memory_bytes: PositiveInt


def describe_hardware() -> Hardware:
    """Processor name, cores and memory of this machine."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return Hardware(cpu=name, cores=os.cpu_count() or 1, memory_bytes=psutil.virtual_memory().total)
