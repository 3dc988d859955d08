from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from pipelines.plan import LanePlan, Permutation

GOLDEN_SMALL = [5, 7, 1, 0, 6, 4, 8, 3, 2, 9]
GOLDEN_LARGE = [94, 515, 374, 845, 300, 153, 46, 287, 28, 784]
CASES = settings(max_examples=300, deadline=None)


@st.composite
def plans(draw):
    """A domain, a cut in lanes: all that decides an order."""
    lanes = draw(st.integers(1, 6))
    rows_per_shard = draw(st.integers(1, 70))
    most = min(400, 30 * rows_per_shard)
    return {
        "rows_per_shard": rows_per_shard,
        "total_rows": draw(st.integers(lanes, most)),
        "seed": draw(st.integers(0, 2**40)),
        "stream": draw(st.sampled_from(["a", "b", "pair"])),
        "lanes": lanes,
        "window_shards": draw(st.integers(1, 5)),
    }


def rows_of(plan: LanePlan, start: int, n: int) -> list[int]:
    _, parts, rows = plan.locate_many(start, n)
    return (parts * plan.rows_per_shard + rows).tolist()


@CASES
@given(plans(), st.integers(0, 3))
def test_lanes__one_epoch_is_each_sample_exactly_once(fields, epoch):
    seen = Counter()
    lengths = []
    for lane in range(fields["lanes"]):
        plan = LanePlan(lane=lane, **fields)
        lengths.append(plan.length)
        epochs, _, rows = plan.locate_many(epoch * plan.length, plan.length)
        assert (epochs == epoch).all()
        assert (rows < plan.rows_per_shard).all()
        seen.update(rows_of(plan, epoch * plan.length, plan.length))
    assert max(lengths) - min(lengths) <= 1
    assert seen == Counter(range(fields["total_rows"]))


@CASES
@given(plans(), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_order__does_not_depend_on_the_number_of_workers(fields, world, batch, steps):
    """A global step is its logical ranks in order, whoever hosts them; each worker is asked for its own alone."""
    lanes = fields["lanes"]

    def worker(rank: int) -> dict[tuple[int, int], list[int]]:
        hosted = range(rank, lanes, world)
        return {
            (step, lane): rows_of(LanePlan(lane=lane, **fields), step * batch, batch)
            for step in range(steps)
            for lane in hosted
        }

    together: dict[tuple[int, int], list[int]] = {}
    for rank in range(world):
        together |= worker(rank)
    alone = {
        (step, lane): rows_of(LanePlan(lane=lane, **fields), 0, steps * batch)[step * batch : (step + 1) * batch]
        for step in range(steps)
        for lane in range(lanes)
    }
    assert together == alone


@CASES
@given(plans(), st.integers(0, 900), st.integers(1, 60))
def test_restart__any_position_gives_what_the_whole_run_gives(fields, start, n):
    plan = LanePlan(lane=fields["lanes"] - 1, **fields)
    whole = rows_of(plan, 0, start + n)
    assert rows_of(plan, start, n) == whole[start:]
    epoch, part, row = plan.locate(start)
    assert part * plan.rows_per_shard + row == whole[start]
    assert epoch == start // plan.length


@CASES
@given(plans(), st.integers(0, 900))
def test_window_parts__hold_every_row_up_to_the_next_window(fields, position):
    plan = LanePlan(lane=0, **fields)
    epoch, window, parts = plan.window_parts(position)
    end = plan.next_window(position)
    epochs, found, _ = plan.locate_many(position, end - position)
    assert end > position
    assert len(parts) <= plan.window_shards
    assert set(found.tolist()) <= set(parts)
    assert (epochs == epoch).all()
    assert plan.window_parts(end)[:2] != (epoch, window)


@CASES
@given(st.integers(1, 100_000), st.integers(0, 2**62))
def test_permutation__is_a_bijection_with_an_inverse(count, key):
    permutation = Permutation.keyed(count, key)
    index = np.unique(np.linspace(0, count - 1, 500).astype(np.int64))
    image = permutation.forward(index)
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < count
    np.testing.assert_array_equal(permutation.inverse(image), index)


def test_permutation__small_ones_reach_every_order_about_equally_often():
    orders = Counter(tuple(Permutation.keyed(4, seed).forward(np.arange(4))) for seed in range(2400))
    assert len(orders) == 24
    assert min(orders.values()) > 60
    assert max(orders.values()) < 140


def test_permutation__golden_value():
    # A change here changes the order of the data of every run.
    assert Permutation.keyed(10, 0, "a", 0).forward(np.arange(10)).tolist() == GOLDEN_SMALL
    assert Permutation.keyed(1000, 0, "a", 0).forward(np.arange(10)).tolist() == GOLDEN_LARGE


def test_locate__billions_of_rows_need_no_memory():
    plan = LanePlan(500, 3 * 10**9 + 7, seed=1, stream="a", lane=3, lanes=8)
    epoch, part, row = plan.locate(10**9)
    assert epoch == 2
    assert 0 <= part < plan.shards
    assert 0 <= row < 500


def test_epochs_and_streams__have_orders_of_their_own():
    first = LanePlan(50, 200, seed=1, stream="a", lane=0, lanes=1)
    assert rows_of(first, 0, 200) != rows_of(first, 200, 200)
    for other in ({"seed": 2, "stream": "a"}, {"seed": 1, "stream": "b"}):
        assert rows_of(first, 0, 200) != rows_of(LanePlan(50, 200, lane=0, lanes=1, **other), 0, 200)


def test_plan__fewer_samples_than_lanes_is_refused():
    with pytest.raises(DataError, match="3 samples for 4 logical ranks; add images or lower"):
        LanePlan(8, 3, seed=0, stream="a", lane=0, lanes=4)
