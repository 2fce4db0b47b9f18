"""Private helpers that several packages share: checks, copies, files, modes, processes and compilation."""

from clusterguard._support._allocator import keep_freed_memory
from clusterguard._support._bars import bar, is_watched, write_line
from clusterguard._support._changes import changed_in_place, is_changed
from clusterguard._support._checks import (
    IN_GREY_LEVELS,
    check_calibrated,
    check_deployable,
    check_detector,
    check_images,
    check_kind,
    check_labels,
    check_linf_radius,
    check_names,
    check_numbers,
    check_range,
    check_tensor,
    check_verdicts,
    in_range,
    is_unicode,
)
from clusterguard._support._compiling import CompiledCall, NetworkCall, call_uncompiled, check_gradients
from clusterguard._support._copying import (
    copy_backbone,
    copy_module,
    copy_values,
    refuse_unusable,
    settle_weights,
    shorten,
)
from clusterguard._support._files import check_archive, check_place, open_ordinary, read_archive, write_atomically
from clusterguard._support._locks import only_writer
from clusterguard._support._markdown import code_in_markdown, escape_markdown
from clusterguard._support._mode_flags import names_in_eval_mode, to_eval_mode
from clusterguard._support._modes import evaluation_mode, sole_use, train_when_unread, training_mode
from clusterguard._support._pages import Markup, escape, html_page, html_table, visible
from clusterguard._support._processes import OneProcess, check_accelerator, gather, share
from clusterguard._support._progress import Progress, digest_of, previous, read_progress, save_progress
from clusterguard._support._randomness import draws_random_numbers, random_states, set_random_states
from clusterguard._support._reachable import GENERATORS, attributes_of, custom_classes, is_user_module, reachable
from clusterguard._support._switches import ProcessSwitch, no_warnings
from clusterguard._support._tables import look_up
from clusterguard._support._tracing import call_untraced, is_traced, tracing_in_this_thread
from clusterguard_torchvision import on_torch_import

__all__ = [
    "GENERATORS",
    "IN_GREY_LEVELS",
    "CompiledCall",
    "Markup",
    "NetworkCall",
    "OneProcess",
    "ProcessSwitch",
    "Progress",
    "attributes_of",
    "bar",
    "call_uncompiled",
    "call_untraced",
    "changed_in_place",
    "check_accelerator",
    "check_archive",
    "check_calibrated",
    "check_deployable",
    "check_detector",
    "check_gradients",
    "check_images",
    "check_kind",
    "check_labels",
    "check_linf_radius",
    "check_names",
    "check_numbers",
    "check_place",
    "check_range",
    "check_tensor",
    "check_verdicts",
    "code_in_markdown",
    "copy_backbone",
    "copy_module",
    "copy_values",
    "custom_classes",
    "digest_of",
    "draws_random_numbers",
    "escape",
    "escape_markdown",
    "evaluation_mode",
    "gather",
    "html_page",
    "html_table",
    "in_range",
    "is_changed",
    "is_traced",
    "is_unicode",
    "is_user_module",
    "is_watched",
    "keep_freed_memory",
    "look_up",
    "names_in_eval_mode",
    "no_warnings",
    "only_writer",
    "open_ordinary",
    "previous",
    "random_states",
    "reachable",
    "read_archive",
    "read_progress",
    "refuse_unusable",
    "save_progress",
    "set_random_states",
    "settle_weights",
    "share",
    "shorten",
    "sole_use",
    "to_eval_mode",
    "tracing_in_this_thread",
    "train_when_unread",
    "training_mode",
    "visible",
    "write_atomically",
    "write_line",
]

on_torch_import()  # here too: torch may not have run the entry point
