"""Peak of private memory: without pages of files, which the kernel can drop; with a peak between two samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from jobs.worker.memory import PrivatePeak, ResidentMemory, resident_memory

MIB = 1 << 20
MEASURE = """
import json, mmap, sys
from jobs.worker.memory import PrivatePeak, resident_memory
watch, first = PrivatePeak(), resident_memory()
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(mapped[place] for place in range(0, len(mapped), 4096))
    watch.sample()
    short = bytearray(48 << 20)
    del short  # between two samples
    watch.sample()
    print(json.dumps([first.private, watch.bytes, resident_memory().peak, resident_memory().mapped]))
"""


def test_mapped_pages_do_not_count_and_a_short_peak_does(tmp_path: Path) -> None:
    """64 MiB of a file and, for a moment, 48 MiB of memory, in a real process: the resident peak is 112 MiB higher, the private peak 48."""
    file = tmp_path / "frames"
    file.write_bytes(bytes(64 * MIB))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=True)
    first, own, peak, mapped = json.loads(done.stdout)
    assert mapped > 64 * MIB
    assert peak - first > 110 * MIB
    # The file is read between the first two samples: only what was resident at the first is subtracted.
    assert 47 * MIB < own - first < 80 * MIB


def test_a_rise_of_the_peak_between_samples_counts_as_private() -> None:
    """Minus the fewer pages of files at the two samples; if the peak has not risen, the current private memory counts."""
    samples = iter(
        [
            ResidentMemory(100, 90, 10),
            ResidentMemory(100, 95, 5),
            ResidentMemory(200, 80, 60),
            ResidentMemory(200, 140, 60),
            ResidentMemory(300, 140, 50),
        ]
    )
    watch = PrivatePeak(lambda: next(samples))
    found = [watch.bytes]
    for _ in range(4):
        watch.sample()
        found.append(watch.bytes)
    assert found == [90, 95, 195, 195, 250]


def test_a_kernel_that_reports_no_memory(tmp_path: Path) -> None:
    """Other systems have no such file, or not these lines."""
    (tmp_path / "status").write_text("VmHWM:\t  12 kB\nName:\tx\n")
    assert resident_memory(tmp_path / "status") is None
    assert resident_memory(tmp_path / "none") is None
    silent = PrivatePeak(lambda: None)
    silent.sample()
    assert silent.bytes == 0
    assert resident_memory() is not None
