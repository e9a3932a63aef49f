"""A model run by several ranks: rank 0 orders, the others follow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from qwire.v1 import plan_pb2 as pb
from worker.engine.plan import Drawn, ModelRunner, StepPlan
from worker.parallel import Group, GroupError
from worker.runner.runner import TorchRunner
from worker.runner.wire import BEAT, STOP, decode_step, encode_step

log = logging.getLogger(__name__)

BEATS_PER_TIMEOUT = 4
LONGEST_BEAT_SECONDS = 5.0


class ParallelRunner:
    """The `ModelRunner` of rank 0: has all ranks execute each plan, its own share included.

    While no plan comes, a thread has the ranks meet now and then: a rank waits for orders no longer than the group's
    timeout, and one that hangs is found out. Steps raise GroupError once the group is lost.

    Args:
        runner: rank 0's share of the model, whose group is connected.
        timeout: that of the group's collectives, in seconds.
        on_lost: called, from that thread, when the group turns out to be lost between steps.
    """

    def __init__(self, runner: TorchRunner, group: Group, *, timeout: float, on_lost: Callable[[], None]) -> None:
        self._runner, self._group, self._on_lost = runner, group, on_lost
        self._lock = threading.Lock()
        self._ordered = False
        self._stopped = threading.Event()
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, timeout / BEATS_PER_TIMEOUT)
        self._beats = threading.Thread(target=self._beat, name="rank beats", daemon=True)
        self._beats.start()

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def block_size(self) -> int:
        return self._runner.block_size

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """See `worker.engine.plan.ModelRunner.execute`."""
        with self._lock:
            self._ordered = True
            self._group.send_all(encode_step(plan))
            return self._runner.execute(plan)

    def stop(self) -> None:
        """Has the other ranks end with status 0. Raises GroupError."""
        self._stopped.set()
        self._beats.join()
        with self._lock:
            self._group.send_all(STOP)

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_seconds):
            with self._lock:
                if self._ordered:
                    self._ordered = False
                    continue
                try:
                    self._group.send_all(BEAT)
                    self._group.meet()
                except GroupError as error:
                    log.error("the group of ranks is lost: %s", error)
                    self._on_lost()
                    return


def follow(runner: ModelRunner, group: Group) -> None:
    """Executes rank 0's orders until it says stop. Raises GroupError when rank 0 is lost."""
    while True:
        order = pb.RankOrder.FromString(group.receive())
        match order.WhichOneof("order"):
            case "step":
                runner.execute(decode_step(order.step))
            case "beat":
                group.meet()
            case "stop":
                return
            case _:
                raise GroupError("rank 0 sent an order of no known kind")
