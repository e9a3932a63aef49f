"""Names that packages load when they are first used."""

from __future__ import annotations

from types import ModuleType

import pytest

import worker.kernels
import worker.model


@pytest.mark.parametrize("module", [worker.kernels, worker.model])
def test_every_name_is_there(module: ModuleType) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
