"""What can be wrong with a model folder."""

from __future__ import annotations


class ModelError(Exception):
    """A model folder that cannot be served; the message names the file and the field or tensor at fault."""
