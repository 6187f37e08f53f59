"""How this process allocates main memory; for processes of one purpose, not for a host's."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Makes this process reuse freed main memory instead of returning it to the system.

    glibc returns every block above 32 MB, and the system clears it anew for the next layer: on a
    virtual machine that took as long as the layers themselves. Other C libraries are left as they
    are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
