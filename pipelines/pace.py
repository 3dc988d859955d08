"""Keep Ray Data's scheduling loop from spinning.

While a stream's output is held back (training is slower than reading, the usual case), `ray.wait` on the waiting task
returns at once, and the loop of Ray 2.60 takes a whole core: measured, it halved the speed of training on two cores.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

_PERIOD_S = 0.02


class Pace(ExecutionCallback):
    """Lets a loop step take at least 20 ms; a chunk of steps takes longer than that to read or to train on."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PERIOD_S)
