"""Dynamic batching without a waiting time: what arrives while the model is busy forms the next batch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batcher:
    """Calls `run(key, items) -> results` in one thread, with up to `batch` items of one key at a time.

    Items of one key (shape and condition) may share a batch. A lone item starts at once. Keys take turns. An item whose
    caller has gone is dropped before it is run. All methods belong to one event loop.
    """

    def __init__(self, run: Callable[[Any, list[Any]], Sequence[Any]], batch: int) -> None:
        self._run, self._batch = run, batch
        self._waiting: OrderedDict[Hashable, deque[tuple[Any, asyncio.Future]]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task | None = None
        self.sizes: deque[int] = deque(maxlen=1000)

    async def submit(self, key: Hashable, item: Any) -> Any:
        """The result for one item; raises what `run` raised for its batch."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            key, members = self._next()
            if not members:
                continue
            self.sizes.append(len(members))
            try:
                results = await loop.run_in_executor(self._thread, self._run, key, [item for item, _ in members])
                assert len(results) == len(members), f"{len(results)} results for {len(members)} items"
            except Exception as error:  # noqa: BLE001 - handed to every caller of the batch
                for _, future in members:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(members, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next(self) -> tuple[Hashable, list[tuple[Any, asyncio.Future]]]:
        key, queue = self._waiting.popitem(last=False)
        members = []
        while queue and len(members) < self._batch:
            item, future = queue.popleft()
            if not future.done():
                members.append((item, future))
        if queue:
            self._waiting[key] = queue
        return key, members
