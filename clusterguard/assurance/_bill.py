"""The bill of materials of a guard in CycloneDX's format: the guard, and every package that runs it, with licences."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, requires
from typing import Any

_USUAL = (  # how packages write a licence, and its name among those of SPDX
    (r"Apache", "Apache-2.0"),
    (r"PIL|MIT-CMU|HPND", "MIT-CMU"),
    (r"\bMIT\b(?!-)", "MIT"),
    (r"ISC", "ISC"),
    (r"MPL|Mozilla", "MPL-2.0"),
    (r"PSF|Python Software Foundation|matplotlib", "PSF-2.0"),
    (r"BSD", "BSD"),
)
_NO_IDENTIFIERS = {"BSD", "not told", "not installed here"}  # SPDX has several BSD licences, and metadata name none


def licence_of(package: str) -> str:
    """The licences of an installed package, by their names in SPDX, as far as its metadata tell them.

    Args:
        package: name of the package.

    Returns:
        Names joined by "and"; "not told" if the metadata name none, and "not installed here" without the package.

    Example:
        >>> licence_of("torch").split(" and ")[0]
        'Apache-2.0'
    """
    try:
        told = [_field(package, "License-Expression"), *(_about(package).get_all("Classifier") or [])]
    except PackageNotFoundError:
        return "not installed here"
    if not any(line.startswith("License") for line in told[1:]) and not told[0]:
        told.append(_field(package, "License").split("\n")[0])
    text = " ".join([told[0], *(line for line in told[1:] if "License" in line or "::" not in line)])
    names = dict.fromkeys(name for pattern, name in _USUAL if re.search(pattern, text))
    return " and ".join(names) or "not told"


def needed_packages(package: str, extras: Sequence[str] = ()) -> dict[str, list[str]]:
    """The installed packages that a package needs, itself included, with those that each of them needs.

    Args:
        package: name of the package.
        extras: names of its extras that are needed too.
    """
    found: dict[str, list[str]] = {}
    waiting = [_plain(package)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        lines = requires(name) or []
        wanted = {_plain(_name(line)) for line in lines if _applies(line, extras if name == _plain(package) else ())}
        found[name] = sorted(one for one in wanted - {name} if _is_installed(one))
        waiting += found[name]
    return dict(sorted(found.items()))


def bill_of_materials(guard: Mapping[str, Any], packages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A bill of materials, CycloneDX 1.6. It has no time and no random serial number, so it is always the same.

    Args:
        guard: component of the guard, with its `bom-ref`.
        packages: names of packages, with those that each of them needs.
    """
    components = [
        {
            "type": "library",
            "bom-ref": _address(name),
            "name": name,
            "version": _field(name, "Version"),
            "licenses": _licences(name),
            "purl": _address(name),
        }
        for name in packages
    ]
    needs = [
        {"ref": _address(name), "dependsOn": [_address(one) for one in wanted]} for name, wanted in packages.items()
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": dict(guard)},
        "components": components,
        "dependencies": [{"ref": guard["bom-ref"], "dependsOn": [_address("clusterguard")]}, *needs],
    }


def licences_by_package(bill: Mapping[str, Any]) -> list[list[str]]:
    """Rows of name, version and licence of a bill's packages."""
    rows = []
    for part in bill["components"]:
        names = [one.get("expression") or " ".join(one["license"].values()) for one in part["licenses"]]
        rows.append([part["name"], part["version"], " and ".join(names)])
    return rows


def _licences(package: str) -> list[dict[str, Any]]:
    if expression := _field(package, "License-Expression"):
        return [{"expression": expression}]
    names = licence_of(package).split(" and ")
    return [{"license": {"name" if name in _NO_IDENTIFIERS else "id": name}} for name in names]


def _field(package: str, name: str) -> str:
    """A field of a package's metadata; empty if it is not there."""
    return str((_about(package).get_all(name) or [""])[0])


@cache
def _about(package: str) -> PackageMetadata:
    return metadata(package)


def _address(package: str) -> str:
    """The package URL, in which a sign such as the + of a local version is escaped."""
    return f"pkg:pypi/{package}@{_field(package, 'Version').replace('+', '%2B')}"


def _applies(requirement: str, extras: Sequence[str]) -> bool:
    """Whether a requirement is one of the package itself or of these extras."""
    of_extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", requirement)
    return of_extra is None or of_extra[1] in extras


def _is_installed(package: str) -> bool:
    try:
        return bool(_about(package))
    except PackageNotFoundError:  # other systems or versions of Python need it
        return False


def _name(requirement: str) -> str:
    return re.split(r"[\s\[(<>=~!;]", requirement, maxsplit=1)[0]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
