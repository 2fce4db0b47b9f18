"""Helpers that several packages of the benchmarks share, three of which are private parts of the library."""

from clusterguard._support import evaluation_mode, keep_freed_memory, write_atomically

from benchmarks._support._accepting import without_refusal
from benchmarks._support._adv_lib import import_adv_lib
from benchmarks._support._json import write_json
from benchmarks._support._markdown import markdown_table
from benchmarks._support._toml import read_toml

__all__ = [
    "evaluation_mode",
    "import_adv_lib",
    "keep_freed_memory",
    "markdown_table",
    "read_toml",
    "without_refusal",
    "write_atomically",
    "write_json",
]
