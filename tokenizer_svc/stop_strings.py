"""Finding stop strings in a text that arrives piece by piece, with nothing kept but the text that is held back.

Invariant: after any number of characters the automaton's node is the longest suffix of the text that is a prefix of a
stop string. So what must be held is read off the node, and no text is searched twice.

Algorithm: Aho and Corasick, "Efficient string matching", CACM 18(6), 1975.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer_svc.errors import StopOptionsError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024  # in one stop string


@dataclass(frozen=True)
class StopOptions:
    """When a sequence's text ends.

    Attributes:
        strings: stop strings, each of 1 to MAX_STOP_CHARS characters, at most MAX_STOP_STRINGS of them.
        include_stop: the text keeps the stop string that ended it.
        min_tokens: occurrences that end within the text of fewer ids than this are ignored: see `StopMatcher.feed`.

    Raises:
        StopOptionsError: a limit is broken.
    """

    strings: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.strings) > MAX_STOP_STRINGS:
            raise StopOptionsError("strings", f"{len(self.strings)} stop strings, at most {MAX_STOP_STRINGS} allowed")
        for index, text in enumerate(self.strings):
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise StopOptionsError(f"strings[{index}]", f"{len(text)} characters, 1 to {MAX_STOP_CHARS} allowed")
        if self.min_tokens < 0:
            raise StopOptionsError("min_tokens", f"{self.min_tokens} is negative")


@dataclass(frozen=True)
class Match:
    """A stop string found. `end` counts the characters of the fed text up to and including its last one."""

    stop: str
    end: int


class StopMatcher:
    """The automaton for one set of stop strings and the place reached in one text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._stop: list[str | None] = [None]  # the longest stop string that ends at the node
        depth = [0]
        for stop in stops:
            node = 0
            for char in stop:
                if char not in self._next[node]:
                    self._next[node][char] = len(self._next)
                    self._next.append({})
                    self._stop.append(None)
                    depth.append(depth[node] + 1)
                node = self._next[node][char]
            self._stop[node] = stop
        self._fail = [0] * len(depth)
        self._hold = [0] * len(depth)  # characters at the end of the text that may yet begin a stop string
        self._link(depth)
        self._node = 0

    def _link(self, depth: list[int]) -> None:
        queue = list(self._next[0].values())
        for node in queue:  # grows while it is walked: breadth first
            fail = self._fail[node]
            self._stop[node] = self._stop[node] or self._stop[fail]
            # A node without children is a whole stop string, and nothing longer can come of it.
            self._hold[node] = depth[node] if self._next[node] else self._hold[fail]
            for char, child in self._next[node].items():
                self._fail[child] = self._step(fail, char)
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while char not in self._next[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return self._next[node][char]

    @property
    def hold(self) -> int:
        """How many characters at the end of the text fed so far are a proper prefix of a stop string: the most."""
        return self._hold[self._node]

    def feed(self, text: str, *, ignore: bool = False) -> Match | None:
        """Go on with `text`; the first occurrence to end in it, and of those that end at one place the longest.

        With `ignore`, occurrences that end in `text` do not count, now or later, and go by as ordinary text. Another
        occurrence that begins within or before them and ends in a later piece counts as ever. After a match the rest
        of `text` is not looked at, and the matcher is of no further use.
        """
        node = self._node
        root = self._next[0]
        for index, char in enumerate(text):
            node = self._step(node, char) if node else root.get(char, 0)
            stop = self._stop[node]
            if stop is not None and not ignore:
                self._node = node
                return Match(stop, index + 1)
        self._node = node
        return None
