"""Tensor and pipeline parallelism by processes: groups of ranks, their collectives, and the launcher that starts
them."""

from worker.parallel.group import Group, GroupError
from worker.parallel.launcher import LOST, Place, RankPolicy, run_ranks

__all__ = ["LOST", "Group", "GroupError", "Place", "RankPolicy", "run_ranks"]
