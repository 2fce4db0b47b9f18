"""What can happen to a file: ways to damage it, each by name."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from clusterguard.errors import ClusterGuardError
from safetensors.torch import save
from torch import nn


def archive(content: object) -> bytes:
    """What `torch.save` makes of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def foreign() -> dict[str, bytes]:
    """Whole files of something else, and of nothing."""
    arrays, empty = io.BytesIO(), io.BytesIO()
    np.savez(arrays, values=np.arange(3))
    zipfile.ZipFile(empty, "w").close()
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    return {
        "empty": b"",
        "zeros": bytes(3000),
        "text": b"not what you think\n" * 50,
        "another encoding": "Größe\n".encode("utf-16"),
        "pickle": pickle.dumps({"parts": {}, "values": {}}),
        "deep json": b"[" * 200_000,
        "deep object": b'{"format": ' * 100_000,
        "huge number": b'{"format": "clusterguard", "format_version": 1' + b"0" * 5000 + b"}",
        "infinite number": b'{"format": "clusterguard", "format_version": 1e999}',
        "wrong types": json.dumps({"format": ["clusterguard"], "format_version": {}}).encode(),
        "arrays": arrays.getvalue(),
        "empty archive": empty.getvalue(),
        "tensors": save({"weight": torch.ones(2)}),
        "module": archive(nn.Linear(2, 2)),
        "list": archive([1, 2]),
        "deep list": archive(deep),
        "other keys": archive({1: 2}),
        "old format": old_archive({"parts": {}, "values": {}}),
    }


def old_archive(content: object) -> bytes:
    """What `torch.save` made of it before it wrote archives."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The file cut off, with bits and bytes flipped, and replaced."""
    yield from foreign().items()
    size = len(content)
    places = sorted({*range(0, min(size, 8)), *(size * part // 23 for part in range(23)), size - 30, size - 1})
    for place in places:
        if 0 <= place < size:
            yield f"cut off at {place}", content[:place]
            for mask in (0x01, 0x80, 0xFF):
                changed = bytearray(content)
                changed[place] ^= mask
                yield f"{place} ^ {mask}", bytes(changed)
    yield "doubled", content + content
    yield "a hole", content[: size // 3] + bytes(size // 3) + content[size // 3 * 2 :]


def assert_refused_or_read(file: Path, read: Callable[[], object]) -> None:
    """Whatever happens to a file, reading it works or raises an error of ours: one line, with the file's name."""
    content, refused = file.read_bytes(), 0
    for name, changed in [*damaged(content), ("a folder", None)]:
        file.unlink()
        file.mkdir() if changed is None else file.write_bytes(changed)
        try:
            read()
        except ClusterGuardError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message, name
            assert message.isprintable(), name
            assert file.name in message, name
            assert len(message) < 1500, name
        except Exception as error:
            pytest.fail(f"{name}: {error!r}")
        else:
            assert name not in {*foreign(), "a folder"}
        if changed is None:
            file.rmdir()
            file.touch()
    file.write_bytes(content)
    read()
    assert refused > 50
