from __future__ import annotations

import copy
import json
import pickle
import re
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupyter_hybrid.errors import HybridError, ResourceError
from jupyter_hybrid.spec import (
    ID_PATTERN,
    JobSpec,
    JobState,
    Resources,
    format_memory,
    format_time,
    new_id,
    parse_memory,
    parse_time,
    round_memory,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r\0"), min_size=1, max_size=20)
durations = st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=3650))
resources = st.builds(
    Resources,
    nodes=st.integers(1, 10_000),
    tasks_per_node=st.integers(1, 1000),
    cpus=st.integers(1, 1000),
    gpus=st.integers(0, 64),
    memory=st.none() | st.integers(2**20, 2**70),
    time=st.none() | durations,
    partition=st.none() | words,
    qos=st.none() | words,
    account=st.none() | words,
    constraint=st.none() | words,
    priority=st.integers(-1000, 1000),
    extra=st.dictionaries(words, st.none() | words, max_size=3),
)


def test_only_four_states_are_final_and_unknown_is_not():
    assert [s.name for s in JobState if s.final] == ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"]


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("8G", 8 * 1024**3),
        ("8g", 8 * 1024**3),
        ("8GB", 8 * 1024**3),
        ("8GiB", 8 * 1024**3),
        ("512 MiB", 512 * 1024**2),
        (" 1.5T ", 3 * 1024**4 // 2),
        ("100", 100),
        ("100B", 100),
        ("9007199254740993", 2**53 + 1),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_memory_is_bytes_in_powers_of_1024(text, amount):
    assert parse_memory(text) == amount


def test_memory_with_an_unknown_unit_says_how_to_write_it():
    with pytest.raises(ResourceError) as error:
        Resources.parse(memory="8Q")
    assert str(error.value) == "memory '8Q' is not an amount; write it like 8G, 512M or 1.5T (K, M, G, T, P)"
    assert isinstance(error.value, (HybridError, ValueError))


@pytest.mark.parametrize(
    "wrong", ["", "G", "-8G", "8 G B", "8iB", "0", "0.0001", "1e3", "٨G", True, 0, -1, float("nan"), float("inf"), [8]]
)
def test_what_is_no_memory_is_refused(wrong):
    with pytest.raises(ResourceError, match=re.escape(f"memory {wrong!r}")):
        parse_memory(wrong)


@patient
@given(st.integers(1, 2**70))
def test_memory_text_reads_back_exactly(amount):
    assert parse_memory(format_memory(amount)) == amount


@patient
@given(st.integers(1, 1023), st.sampled_from("KMGTP"))
def test_memory_text_is_the_shortest(number, unit):
    assert format_memory(parse_memory(f"{number}{unit}")) == f"{number}{unit}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90min", timedelta(minutes=90)),
        ("90 minutes", timedelta(minutes=90)),
        ("1 minute", timedelta(minutes=1)),
        ("30 seconds", timedelta(seconds=30)),
        ("500ms", timedelta(seconds=0.5)),
        ("2 weeks", timedelta(weeks=2)),
        ("1h30m", timedelta(minutes=90)),
        ("1h, 30 mins", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("2 Days", timedelta(days=2)),
        ("1:30:00", timedelta(minutes=90)),
        ("90:00", timedelta(minutes=90)),
        ("2-00:00:00", timedelta(days=2)),
        ("1-12", timedelta(hours=36)),
        ("1-12:30", timedelta(hours=36, minutes=30)),
        ("90", timedelta(seconds=90)),
        (90, timedelta(seconds=90)),
        (0.5, timedelta(seconds=0.5)),
        (timedelta(hours=1), timedelta(hours=1)),
    ],
)
def test_time_is_read_as_slurm_and_as_people_write_it(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "h", "1x", "1h30", "1:60", "1:00:60", "1:2:3:4", "-5", "1h -3m", "1,5h", "5 msx", "0", "0:00"),
        *("9" * 5000, "99999999999w"),
        *(True, 0, -1, float("nan"), float("inf"), 1e300, timedelta(0), [1], None),
    ],
)
def test_what_is_no_duration_is_refused(wrong):
    with pytest.raises(ResourceError, match=r"^time "):
        parse_time(wrong)


@patient
@given(st.integers(1, 10**11))
def test_time_text_reads_back_exactly(seconds):
    assert parse_time(format_time(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@patient
@given(durations)
def test_time_text_rounds_up_to_the_next_second(duration):
    assert timedelta(0) <= parse_time(format_time(duration)) - duration < timedelta(seconds=1)


@patient
@given(resources)
def test_resources_survive_json_text(asked):
    assert Resources.from_json(json.loads(json.dumps(asked.to_json()))) == asked


@patient
@given(resources)
def test_resources_can_be_pickled_and_copied(asked):
    assert pickle.loads(pickle.dumps(asked)) == asked == copy.deepcopy(asked)


def test_resources_of_a_later_version_are_read():
    assert Resources.from_json({**Resources(cpus=3).to_json(), "later": 1}) == Resources(cpus=3)


def test_resources_are_laid_over_a_base():
    base = Resources.parse(cpus=4, memory="8G", extra={"reservation": "course", "exclusive": None})
    asked = Resources.parse(base, memory="16G", time=None, gpus_per_node="2", extra={"reservation": "exam"})
    assert (asked.cpus, asked.gpus, asked.memory, asked.time) == (4, 2, 16 * 1024**3, None)
    assert asked.extra == {"reservation": "exam", "exclusive": None}
    assert base.extra == {"reservation": "course", "exclusive": None}


def test_total_cpus_counts_nodes_and_tasks():
    assert Resources.parse(nodes=2, tasks_per_node=3, cpus_per_task=4).total_cpus == 24


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"memry": "8G"}, "unknown resource 'memry'; did you mean 'memory'?"),
        ({"cpus": 0}, "cpus 0 is not a whole number of at least 1"),
        ({"cpus": 1.5}, "cpus 1.5 is not a whole number of at least 1"),
        ({"cpus": True}, "cpus True is not a whole number of at least 1"),
        ({"nodes": "two"}, "nodes 'two' is not a whole number of at least 1"),
        ({"gpus": -1}, "gpus -1 is not a whole number of at least 0"),
        ({"priority": "high"}, "priority 'high' is not a whole number"),
        ({"cpus": 1, "cpus_per_task": 2}, "cpus is given twice"),
        ({"partition": "a\nb"}, "partition 'a\\nb' is not a word"),
        ({"partition": ""}, "partition '' is not a word"),
        ({"partition": ["a", "b"]}, "partition ['a', 'b'] is not a word"),
        ({"extra": "x"}, "extra 'x' must be a mapping"),
        ({"extra": {1: "x"}}, "extra {1: 'x'} must be a mapping"),
    ],
)
def test_a_wrong_resource_is_named(asked, message):
    with pytest.raises(ResourceError, match="^" + re.escape(message)):
        Resources.parse(**asked)


def test_ids_fit_folders_slurm_and_kubernetes_and_differ():
    ids = {new_id() for _ in range(5000)}
    assert len(ids) == 5000
    assert all(ID_PATTERN.fullmatch(new) and re.fullmatch(r"[a-z][a-z0-9]{9}", new) for new in ids)
    assert {new[0] for new in ids} == set("abcdefghjkmnpqrstvwxyz")


@patient
@given(resources, words, st.integers(1, 10**6), st.lists(words, max_size=3), st.dictionaries(words, words, max_size=3))
def test_a_spec_survives_json_text(asked, name, tasks, after, mapping):
    spec = JobSpec(
        id=new_id(),
        name=name,
        pool="hpc",
        kind="function",
        tasks=tasks,
        array=tasks > 1,
        batch=0,
        resources=asked,
        created=1.5,
        after=tuple(after),
        out=("x", "y"),
        origin=mapping,
        keys=mapping,
        versions=mapping,
        settings={"prologue": ["module load x"]},
    )
    data = json.loads(json.dumps(spec.to_json()))
    assert data["schema"] == 1
    assert JobSpec.from_json({**data, "later": True}) == spec


def test_memory_without_a_unit_is_asked_for_one():
    with pytest.raises(ResourceError, match=r"memory '16' is only 16 bytes; give a unit, like 16G or 16M"):
        Resources.parse(memory="16")


@given(st.integers(1, 2**60))
def test_rounded_memory_is_never_more_and_short(amount):
    text = round_memory(amount)
    assert 0.9 * amount <= parse_memory(text) <= amount
    assert len(text) <= 7


def test_rounded_memory():
    assert [round_memory(n) for n in (24684092 * 1024, 2**30, 1023, 1536)] == ["23.5G", "1G", "1023", "1.5K"]
