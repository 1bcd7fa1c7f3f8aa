"""A GPU that the catalog does not know, from the two facts that decide most: its memory and its compute capability.

    target("t4")                                              the catalog's
    target("t4", vram="7.5GiB")                               the catalog's with other memory: a slice, a driver's share
    target("my-card", vram="24GiB", capability="8.6")         neither name nor memory need be known

The capability decides which formats and kernels there are. Rates, bandwidth and context are taken from the catalog's
nearest card, and the note says from which.
"""

from __future__ import annotations

import re
from dataclasses import replace

from floatline.errors import ConfigError
from floatline.hardware.catalog import ALIASES, CATALOG, GIB, Hardware
from floatline.hardware.detect import resolve

GIVE = "give --vram 24GiB --capability 8.6 for a GPU that is not listed"
_UNITS = {f"{letter}{i}B": base**power for power, letter in enumerate("KMGT", 1)
          for i, base in (("i", 1024), ("", 1000))}  # fmt: skip
_BY_FOLDED = {unit.lower(): factor for unit, factor in _UNITS.items()}
_OLDEST, _NEWEST = 5, 12
"""Major compute capabilities that recent PyTorch was built for."""


def parse_size(text: str, what: str = "size") -> int:
    """Read an amount of memory as bytes: binary units (KiB, MiB, GiB, TiB) or decimal ones (KB, MB, GB, TB).

    Args:
        text: A number and a unit.
        what: What it is the size of, for the error.

    Raises:
        ConfigError: It is not that, or 0.

    >>> parse_size("24GiB"), parse_size("24 gb"), parse_size("22.5GiB")
    (25769803776, 24000000000, 24159191040)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    factor = _BY_FOLDED.get(found.group(2).lower()) if found else None
    if found is None or factor is None or float(found.group(1)) == 0:
        raise ConfigError(
            f"{what} {text!r} is not an amount of memory", hint=f"write 24GiB; units: {', '.join(_UNITS)}"
        )
    return round(float(found.group(1)) * factor)


def parse_capability(text: str) -> tuple[int, int]:
    """Read a compute capability.

    Raises:
        ConfigError: It is not MAJOR.MINOR, or none that PyTorch is built for.

    >>> parse_capability("8.6")
    (8, 6)
    """
    found = re.fullmatch(r"\s*(\d+)\.(\d)\s*", text)
    if found is None or not _OLDEST <= int(found.group(1)) <= _NEWEST:
        raise ConfigError(
            f"capability {text!r} is not a CUDA compute capability from {_OLDEST}.0 to {_NEWEST}.9",
            hint="write 8.6; torch.cuda.get_device_capability() or `nvidia-smi --query-gpu=compute_cap` tells it",
        )
    return int(found.group(1)), int(found.group(2))


def target(name: str = "auto", *, vram: str | None = None, capability: str | None = None) -> Hardware:
    """Return the device that a user means.

    Args:
        name: A catalog name, "auto", "cpu"; with `vram` and `capability` any name, or "auto" for none.
        vram: Memory as torch reports it (`total_memory`), e.g. "24GiB".
        capability: Compute capability, e.g. "8.6".

    Raises:
        ConfigError: A name that is not in the catalog without both facts, or facts that cannot be read.

    >>> target("my-card", vram="24GiB", capability="8.6").note
    '24.0 GiB and capability 8.6 as given; rates, bandwidth and context of rtx-3090'
    """
    memory = None if vram is None else parse_size(vram, "--vram")
    if capability is not None:
        pair = parse_capability(capability)
        if memory is None:
            raise ConfigError(f"--capability {capability} was given without --vram", hint=GIVE)
        return _from_facts(name, memory, pair)
    try:
        known = resolve(name)
    except ConfigError as error:
        raise ConfigError(error.message, hint=f"{error.hint}{_joint(error.hint)}{GIVE}") from None
    if memory is None:
        return known
    note = f"{memory / GIB:.1f} GiB as given; the rest is that of {known.name}"
    return replace(known, name=f"{known.name} with {memory / GIB:.1f} GiB", memory=memory, note=note)


def _joint(hint: str) -> str:
    return " Or " if hint.endswith("?") else "; or "


def _from_facts(name: str, memory: int, capability: tuple[int, int]) -> Hardware:
    folded = name.lower()
    entry = CATALOG.get(ALIASES.get(folded, folded))
    if entry is not None and entry.capability != capability:
        have = "{}.{}".format(*(entry.capability or (0, 0)))
        raise ConfigError(
            f"{name} has capability {have}, not {'{}.{}'.format(*capability)}",
            hint="leave --capability out, or give the GPU another name",
        )
    twin = entry or min(CATALOG.values(), key=lambda other: _distance(other, memory, capability))
    shown = f"{memory / GIB:.1f} GiB"
    spelled = "{}.{}".format(*capability)
    return replace(
        twin,
        name=f"a GPU of capability {spelled} with {shown}" if name == "auto" else name,
        capability=capability,
        memory=memory,
        note=f"{shown} and capability {spelled} as given; rates, bandwidth and context of {twin.name}",
    )


def _distance(other: Hardware, memory: int, capability: tuple[int, int]) -> tuple[int, int]:
    major, minor = other.capability or (0, 0)
    return abs(10 * (major - capability[0]) + minor - capability[1]), abs(other.memory - memory)
