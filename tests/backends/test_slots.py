from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_hybrid.backends.slots import PASSES, Request, Slots, start


def request(native_id, cpus=1, memory=None, gpus=0, priority=0, waiting=1, **more):
    plain = {"pool": "a", "script": "", "logs": "", "first": 0, "array": True, "walltime": None, "environment": {}}
    values = {**plain, "after": [], "held": False, **more}
    return Request(
        native_id, cpus=cpus, memory=memory, gpus=gpus, priority=priority, **values, waiting=deque(range(waiting))
    )


def started(requests, slots):
    """Return what one round starts, as (native id, index, devices)."""
    seen = []

    def claim(one, index, devices):
        seen.append((one.native_id, index, devices))
        return True

    start(sorted(requests, key=lambda one: one.order), {"a": slots}, claim)
    return seen


def test_order_is_priority_then_submission():
    requests = [request(1), request(2, priority=5), request(3)]
    assert [one[0] for one in started(requests, Slots(3, 0, []))] == [2, 1, 3]


def test_held_and_dependent_ones_do_not_start():
    assert started([request(1, held=True), request(2, after=[1]), request(3)], Slots(8, 0, [])) == [(3, 0, [])]


def test_each_gets_devices_of_its_own():
    assert started([request(1, gpus=2, waiting=3)], Slots(8, 0, [0, 1, 2, 3])) == [(1, 0, [0, 1]), (1, 1, [2, 3])]


def test_a_big_one_is_passed_a_limited_number_of_times():
    big, small = request(1, cpus=2), request(2, waiting=1000)
    passed = 0
    # One of two slots is always taken: the big one never fits unless the pool is kept for it.
    while started([big, small], Slots(1, 0, [])):
        passed += 1
    assert passed == PASSES
    assert started([big, small], Slots(2, 0, [])) == [(1, 0, [])]
    assert len(started([big, small], Slots(2, 0, []))) == 2


def test_pools_do_not_wait_for_each_other():
    seen = []
    requests = [request(1, cpus=4), request(2, pool="b")]
    start(requests, {"a": Slots(0, 0, []), "b": Slots(1, 0, [])}, lambda one, *_: not seen.append(one.native_id))
    assert seen == [2]


def test_what_cannot_be_claimed_takes_no_slot():
    seen = []

    def claim(one, index, devices):
        seen.append(index)
        return index == 2

    slots = Slots(1, 0, [])
    start([request(1, waiting=5)], {"a": slots}, claim)
    assert seen == [0, 1, 2]
    assert slots.cpus == 0


sizes = st.tuples(
    st.integers(1, 6), st.none() | st.integers(1, 9), st.integers(0, 3), st.integers(-2, 2), st.integers(1, 5)
)


@given(st.lists(sizes, max_size=12), st.integers(0, 8), st.integers(0, 12), st.integers(0, 4))
def test_never_more_than_there_is(wanted, cpus, memory, gpus):
    requests = [request(number, *size) for number, size in enumerate(wanted)]
    seen = started(requests, Slots(cpus, memory, list(range(gpus))))
    by_id = {one.native_id: one for one in requests}
    assert sum(by_id[native_id].cpus for native_id, _, _ in seen) <= cpus
    assert sum(by_id[native_id].memory or 0 for native_id, _, _ in seen) <= memory
    devices = Counter(device for _, _, given in seen for device in given)
    assert set(devices) <= set(range(gpus))
    assert all(count == 1 for count in devices.values())
    assert all(len(given) == by_id[native_id].gpus for native_id, _, given in seen)
    assert len({(native_id, index) for native_id, index, _ in seen}) == len(seen)


@pytest.mark.parametrize("free", [1, 3])
def test_nothing_idles_that_could_run(free):
    assert len(started([request(1, cpus=9), request(2, waiting=9)], Slots(free, 0, []))) == free
