"""How many processes load images."""

import logging
import os

from detectron2.utils import comm
from detectron2.utils.logger import log_first_n


def loading_processes(wanted: int) -> int:
    """``DATALOADER.NUM_WORKERS``, but no more than this process has cores for; at least 1 of them.

    The cores are shared equally by the processes of this machine that train. Where that changes
    the number, the log says so once.

    Args:
        wanted: number of data loading processes; 0 = none.
    """
    cores, processes = usable_cores(), _local_processes()
    number = min(wanted, max(1, cores // processes))
    if number < wanted:
        log_first_n(
            logging.INFO,
            f"Images are loaded by {number} process(es) in place of {wanted} "
            f"(DATALOADER.NUM_WORKERS): {processes} of this run share {cores} core(s)",
            name=__name__,
            key="message",
        )
    return number


def usable_cores() -> int:
    """Number of cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _local_processes() -> int:
    """Number of processes of the run on this machine."""
    try:
        return comm.get_local_size()
    except AssertionError:  # Detectron2's main branch, where it has not been told
        return comm.get_world_size()
