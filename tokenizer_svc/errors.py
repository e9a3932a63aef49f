"""Every way in which this package refuses or fails, as types that the gRPC face maps onto status codes."""

from __future__ import annotations

import enum


class TokenizerError(Exception):
    """Base of all errors raised on purpose here. The text names limits and positions, never a caller's content."""


class TokenizerLoadError(TokenizerError):
    """The model folder's tokenizer or template files are missing, corrupt or of a kind that is not supported."""


class TextError(TokenizerError):
    """A text cannot be encoded as UTF-8 (a lone surrogate)."""


class TokenIdError(TokenizerError):
    """A token id lies outside the vocabulary.

    Attributes:
        index: position of the id in the list that was given.
        value: the id.
        vocab_size: ids must be in [0, vocab_size).
    """

    def __init__(self, index: int, value: int, vocab_size: int) -> None:
        super().__init__(f"token id {value} at index {index} is outside the vocabulary [0, {vocab_size})")
        self.index = index
        self.value = value
        self.vocab_size = vocab_size


class StopOptionsError(TokenizerError):
    """Stop options break a limit. `field` is the option's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ChatFailure(enum.Enum):
    """Why a chat could not be rendered."""

    NO_TEMPLATE = "no_template"  # the model folder has none
    TEMPLATE_REFUSED = "template_refused"  # does not parse, or reaches for what the sandbox forbids
    TEMPLATE_RAISED = "template_raised"  # the template's own raise_exception: it does not take such a chat
    TEMPLATE_FAILED = "template_failed"  # an error while rendering, such as adding a string and a number
    INVALID_CHAT = "invalid_chat"  # the messages, tools or extra values are not of the required form
    INPUT_LIMIT = "input_limit"
    OUTPUT_LIMIT = "output_limit"
    MEMORY_LIMIT = "memory_limit"
    TIME_LIMIT = "time_limit"
    BUSY = "busy"  # as many renders are waiting as may wait; worth trying again
    CRASHED = "crashed"  # the helper process died twice in a row; worth trying again
    CLOSED = "closed"  # the renderer was closed


class ChatError(TokenizerError):
    """A chat could not be rendered.

    Attributes:
        failure: the reason, from a closed list.
        field: for INVALID_CHAT, the path of the offending value ("messages[2].role"), else "".
        detail: for TEMPLATE_RAISED, what the template said, cut to 512 characters. The template's author wrote it and
            may have put message content into it, so it belongs in an answer to the caller but never in a log.
    """

    def __init__(self, failure: ChatFailure, message: str, *, field: str = "", detail: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.failure = failure
        self.field = field
        self.detail = detail
