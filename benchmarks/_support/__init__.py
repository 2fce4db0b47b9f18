"""Helpers that several packages of the benchmarks share."""

from benchmarks._support._files import write_atomically
from benchmarks._support._modes import evaluation_mode
from benchmarks._support._toml import read_toml

__all__ = ["evaluation_mode", "read_toml", "write_atomically"]
