"""The memory of this machine, or of the container that the process is in."""

import os
from pathlib import Path

# Of a control group: version 2 has one hierarchy, version 1 one for memory.
_LIMITS = ("memory.max", "memory.limit_in_bytes")


def host_memory(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that this process can use: those of the machine, or less by its control groups.

    Containers limit memory by control groups; the kernel still states the machine's.

    Args:
        groups: where the control groups are mounted.
        membership: the file that names those of this process.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_limits(groups, membership)])


def _limits(groups: Path, membership: Path) -> list[int]:
    """The limits of the process's control groups and of those around them."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        # In a container the path may be that of the host, of which only the root is mounted.
        own = root / path.lstrip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            found += [limit for name in _LIMITS if (limit := _number(folder / name)) is not None]
    return found


def _number(file: Path) -> int | None:
    """The limit in a file; None for "max", or without the file."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
