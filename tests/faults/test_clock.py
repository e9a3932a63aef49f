"""The wall clock jumps by an hour, forth and back, and nobody takes notice."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwire import Client
from qwire.client import Generation
from tests.helpers.fleets import Fleet, fake_fleet
from worker.fake import continuation

VOCAB = 32_000
TOKENS = 150

# What a process sees of the wall clock is an hour ahead while a file is there; the monotonic clock is left alone.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) { return access(JUMPED, F_OK) == 0 ? 3600 : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += ahead();
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec precise;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that is there while the clock is ahead."""
    return tmp_path_factory.mktemp("clock") / "jumped"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, jumped: Path) -> Iterator[Fleet]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the test needs a C compiler, as installing with kernels does"
    library, source = jumped.with_name("clock.so"), jumped.with_name("clock.c")
    source.write_text(SOURCE)
    define = f'-DJUMPED="{jumped}"'
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", define, "-o", library, source, "-ldl"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        with fake_fleet(tmp_path_factory.mktemp("fleet"), workers=1, worker_flags=("--step-ms", "10")) as fleet:
            yield fleet


def test_the_wall_clock_jumps(fleet: Fleet, jumped: Path) -> None:
    log = fleet.services["worker-0"].log

    def dates() -> set[str]:
        """Days and hours in the worker's log."""
        return {line[:13] for line in log.read_text().splitlines() if line.startswith("20")}

    with Client(fleet.services["router-0"].address) as client:

        def start(number: int) -> Generation:
            stream = client.generate(
                token_ids=[number], max_tokens=TOKENS, ignore_eos=True, temperature=0, text=False, timeout=60
            )
            next(stream)
            return stream

        before = dates()
        streams = [start(number) for number in range(4)]
        jumped.touch()
        streams += [start(number) for number in range(4, 8)]
        for number, stream in enumerate(streams):
            assert stream.read().token_ids == continuation([number], TOKENS, VOCAB)
        late = [start(number) for number in range(8, 12)]
        fleet.start_router(1).wait_until_serving()  # the worker logs its link
        jumped.unlink()
        for number, stream in enumerate(late, 8):
            assert stream.read().token_ids == continuation([number], TOKENS, VOCAB)
    assert len(dates() - before) >= 1, "the clock has not jumped"
    assert all(worker.ready for worker in fleet.workers())
