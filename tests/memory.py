"""The peak memory of a piece of code, run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Not ru_maxrss: across exec it keeps the peak of the process that forked, here a pytest full of torch.
_PEAK = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"


def peak_megabytes(script: str, argument: Path) -> tuple[float, list[str]]:
    """Run `script` with `argument` as sys.argv[1]: its peak in MB, and the lines it printed. Linux only."""
    command = [sys.executable, "-c", script + _PEAK, str(argument)]
    *lines, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return int(peak) / 1024, lines
