"""A proxy between two processes that stalls and cuts what goes through it, where the kernel has no such thing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 4096


class Proxy:
    """Passes bytes between those who connect to `path` and a unix socket. Methods may be called from any thread."""

    def __init__(self, path: Path, target: str) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self._target = target.removeprefix("unix:")
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def stall(self) -> None:
        """Nothing passes any more, in either direction, and nobody is told: a partition."""
        self._call(self._flowing.clear)

    def flow(self) -> None:
        """What was held, and what comes, passes again."""
        self._call(self._flowing.set)

    def cut(self) -> None:
        """Ends all connections, some bytes of theirs underway."""

        def cut() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._call(cut)

    def _call(self, what: object) -> None:
        async def call() -> None:
            what()  # type: ignore[operator]

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back))
                group.create_task(self._pump(there, writer))
        except* OSError:
            pass
        finally:
            for end in (writer, back):
                self._writers.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def start(self) -> None:
        async def serve() -> None:
            self._flowing.set()
            self._server = await asyncio.start_unix_server(self._connected, self._path)

        self._thread.start()
        asyncio.run_coroutine_threadsafe(serve(), self._loop).result(10)

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def proxy(path: Path, target: str) -> Iterator[Proxy]:
    """A running proxy at `path` for the unix socket `target`."""
    running = Proxy(path, target)
    running.start()
    try:
        yield running
    finally:
        running.stop()
