"""Helpers that several packages of the benchmarks share. Two of them are the library's own, which it keeps private."""

from clusterguard._support import evaluation_mode, write_atomically

from benchmarks._support._adv_lib import import_adv_lib
from benchmarks._support._json import write_json
from benchmarks._support._toml import read_toml

__all__ = ["evaluation_mode", "import_adv_lib", "read_toml", "write_atomically", "write_json"]
