"""Room for the files and connections that a process keeps open. No torch."""

from __future__ import annotations

import resource

from megatron_rl.errors import UserError

#: Most files that one rank alone has open (94 seen: libraries, logs, gloo's groups), and what each
#: further rank adds (14 seen, with gloo), with some room.
ALONE, EACH_RANK = 128, 16
#: The highest limit that is set.
PLENTY = 65536


def allow_descriptors(world_size: int) -> None:
    """Raise this process's limit of open files (``ulimit -n``) as far as allowed.

    Raises:
        UserError: the limit is too low for this many ranks; libraries would fail in the middle of a
            run without naming the reason.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = PLENTY if hard == unlimited else min(hard, PLENTY)
    if soft != unlimited and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    needed = ALONE + EACH_RANK * world_size
    if soft != unlimited and soft < needed:
        ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
        raise UserError(
            f"a process may have {soft} files open here; expected at least {needed} for {ranks}; "
            f"raise it with: ulimit -n {max(needed, 4096)}"
        )
