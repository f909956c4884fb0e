"""What the processes of a run (ranks) have to agree on."""

from detectron2.utils import comm

__all__ = ["any_rank"]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank. Every rank has to call it, and gets the same answer."""
    return any(comm.all_gather(flag))
