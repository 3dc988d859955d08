from __future__ import annotations

import asyncio
import threading

import pytest

from deploy.batching import Batcher


def test_submit__what_waits_shares_a_batch():
    gate, calls = threading.Event(), []

    def run(key, items):
        calls.append((key, list(items)))
        gate.wait(5)
        return [item * 10 for item in items]

    async def main():
        batcher = Batcher(run, batch=3)
        first = asyncio.create_task(batcher.submit("a", 0))
        while not calls:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(batcher.submit("ab"[i % 2], i)) for i in range(1, 9)]
        await asyncio.sleep(0.01)
        gate.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [i * 10 for i in range(9)]
    assert calls[0] == ("a", [0])
    assert sorted(calls[1:]) == [("a", [2, 4, 6]), ("a", [8]), ("b", [1, 3, 5]), ("b", [7])]
    # Keys take turns: nobody waits for all of another key.
    assert [key for key, _ in calls[1:3]] == ["b", "a"]


def test_submit__an_error_reaches_its_batch_only():
    def run(key, items):
        if key == "bad":
            raise ValueError("broken")
        return items

    async def main():
        batcher = Batcher(run, batch=4)
        results = await asyncio.gather(
            batcher.submit("bad", 1), batcher.submit("good", 2), batcher.submit("bad", 3), return_exceptions=True
        )
        return results, await batcher.submit("good", 4)

    (first, second, third), later = asyncio.run(main())
    assert isinstance(first, ValueError) and isinstance(third, ValueError) and (second, later) == (2, 4)


def test_submit__abandoned_items_are_not_run():
    gate, seen = threading.Event(), []

    def run(key, items):
        seen.extend(items)
        gate.wait(5)
        return items

    async def main():
        batcher = Batcher(run, batch=1)
        first = asyncio.create_task(batcher.submit("a", 1))
        while not seen:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(batcher.submit("a", 2))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        return await batcher.submit("a", 3)

    assert asyncio.run(main()) == 3
    assert seen == [1, 3]
