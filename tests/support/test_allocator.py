"""Freed memory stays with the process, unless its environment says otherwise."""

import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
SCRIPT = """
import resource
from pathlib import Path
import torch
from clusterguard._support import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

answer = keep_freed_memory()
before = resident()
block = torch.ones(2**20, 50)
del block
print(answer, resident() - before > 150e6)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is no glibc")
@pytest.mark.parametrize(
    ("settings", "expected"), [({}, "True True"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False False")]
)
def test_freed_memory_stays_unless_the_environment_decides(settings, expected, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
