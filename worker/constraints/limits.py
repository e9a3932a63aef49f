"""What a constraint may cost. The grammar library's limits count fuel, not time, so they strike alike everywhere."""

from __future__ import annotations

MAX_TEXT_BYTES = 128 * 1024
"""Of a constraint's text."""
MAX_SCHEMA_DEPTH = 64
"""Nesting of objects and lists in a JSON schema."""
CHECK_SECONDS = 2.0
"""Of the CPU's time for the helper process to check one, after which it is killed."""
CHECK_WAIT_SECONDS = 20.0
"""Until it has answered, however busy the machine is."""
CHECK_MEMORY_BYTES = 256 * 1024 * 1024
"""Address space of the helper process above what it has when it starts."""
CHECK_STACK_BYTES = 8 * 1024 * 1024
STACK_BYTES = 64 * 1024 * 1024
"""Of our own threads that run the library, which recurses over grammars: much more than the helper has, so that what
didn't overflow there doesn't here."""
MAX_COMPILED_BYTES = 64 * 1024 * 1024
"""Of one compiled grammar."""
CACHE_ENTRIES = 1024
CACHE_BYTES = 256 * 1024 * 1024
"""Of compiled grammars that are kept for the next request, whichever comes first."""
MAX_PENDING = 64
"""Requests whose constraints are checked and compiled or wait for that; one more is refused for now."""

FUEL = {
    # Earley items at one byte of the output. What an ambiguous grammar costs a byte grows with their square: at this
    # many it is 7 ms, at the library's own 2,000 most of a second. One in a hundred public schemas needs more.
    "max_items_in_row": 300,
    "step_max_items": 20_000,
    "step_lexer_fuel": 100_000,
    "initial_lexer_fuel": 300_000,
    # At 1 to 2 kB each.
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}
"""Arguments of `llguidance.LLParserLimits`."""
