"""A worker without a model, for tests and load: the real gRPC face, engine and scheduler over a `FakeRunner`.

Importing it brings no torch, so that many of them fit on one core.
"""

from worker.fake.runner import FakeRunner, StepCost, continuation

__all__ = ["FakeRunner", "StepCost", "continuation"]
