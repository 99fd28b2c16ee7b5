from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupyter_hybrid.config import Config, Container, Limits, PoolConfig, Prices, load
from jupyter_hybrid.errors import ConfigError
from jupyter_hybrid.spec import Resources

FULL = """\
default: hpc
pools:
  hpc:
    kind: slurm
    resources: {cpus: 4, memory: 8G, time: 1:30:00, partition: main, extra: {reservation: course, exclusive: }}
    limits: {max_jobs: 100, max_array: 1000, poll_min: 2s, poll_max: 60s}
    storage: $SCRATCH/hybrid
    python: ~/py/bin/python
    prologue: |
      module load python
      source "$HOME/env.sh"
    environment: {OMP_NUM_THREADS: 4, DEBUG: on, MASK: 010}
    env: {SLURM_CONF: /etc/slurm/other.conf}
    container: {kind: singularity, image: "${SCRATCH}/py.sif", bind: [/data, "/scratch:/s"]}
    prices: {cpu_hour: 0.04, gpu_hour: 1.2}
    speed: 1.5
  here:
    kind: local
    cpus: 8
    memory: 16G
    prologue: [a, b]
    container: docker://python
"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Folders for home, project, the user's and two system configurations, and nothing of this machine."""
    from jupyter_core import paths

    for name in ("home/project/deep/er", "user", "system1", "system2", "bin"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(paths, "SYSTEM_CONFIG_PATH", [])
    monkeypatch.setattr(paths, "ENV_CONFIG_PATH", [])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", f"{tmp_path}/system1:{tmp_path}/system2")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("JUPYTER_HYBRID_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path / "home/project")
    return tmp_path


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def pool(name, kind="slurm", **keys):
    return f"pools:\n  {name}:\n    kind: {kind}\n" + "".join(f"    {key}: {value}\n" for key, value in keys.items())


def problems(places, text):
    """Return what is wrong with a file, without the file's name: ``line: key: problem``."""
    path = write(places / "home/project/hybrid.yaml", text)
    with pytest.raises(ConfigError) as error:
        load()
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def test_every_field_is_read(places):
    path = write(places / "home/project/hybrid.yaml", FULL)
    found = load()
    assert found.default == "hpc"
    assert found.files == (path,)
    assert list(found.pools) == ["hpc", "here"]
    assert found.pools["hpc"] == PoolConfig(
        name="hpc",
        kind="slurm",
        resources=Resources(
            cpus=4,
            memory=8 * 1024**3,
            time=timedelta(minutes=90),
            partition="main",
            extra={"reservation": "course", "exclusive": None},
        ),
        limits=Limits(100, 1000, timedelta(seconds=2), timedelta(minutes=1)),
        storage="/scratch/me/hybrid",
        python=f"{places}/home/py/bin/python",
        prologue=("module load python", 'source "$HOME/env.sh"'),
        environment={"OMP_NUM_THREADS": "4", "DEBUG": "on", "MASK": "010"},
        env={"SLURM_CONF": "/etc/slurm/other.conf"},
        container=Container("/scratch/me/py.sif", "singularity", ("/data", "/scratch:/s")),
        prices=Prices(0.04, 1.2),
        speed=1.5,
        source=f"{path}:3",
    )
    assert found.pools["here"] == PoolConfig(
        name="here",
        kind="local",
        prologue=("a", "b"),
        container=Container("docker://python", "apptainer"),
        options={"cpus": 8, "memory": 16 * 1024**3},
        source=f"{path}:17",
    )


def test_a_pool_has_working_defaults(places):
    write(places / "home/project/hybrid.yaml", pool("hpc"))
    found = load().pools["hpc"]
    assert (found.resources, found.storage, found.python, found.container) == (Resources(), None, None, None)
    assert found.limits == Limits(None, None, timedelta(seconds=1), timedelta(seconds=30))
    assert (found.prices, found.speed, dict(found.options), dict(found.env)) == (Prices(0.0, 0.0), 1.0, {}, {})


def test_without_any_file_there_is_a_local_pool():
    assert load() == Config({"local": PoolConfig("local", "local")}, None, ())
    assert load().pool().name == "local"
    assert load().pool().source == "built-in"


@pytest.mark.parametrize(("commands", "kinds"), [(["sbatch", "squeue"], ["local", "slurm"]), (["sbatch"], ["local"])])
def test_slurm_is_found_by_its_commands(places, commands, kinds):
    for name in commands:
        write(places / "bin" / name, "#!/bin/sh\n").chmod(0o755)
    assert [pool.kind for pool in load().pools.values()] == kinds
    assert load().pool().name == "local"
    write(places / "user/hybrid.yaml", pool("hpc"))
    assert list(load().pools) == ["hpc", "local"]


def test_a_local_pool_is_added_unless_one_is_configured(places):
    path = write(places / "user/hybrid.yaml", pool("hpc"))
    assert list(load().pools) == ["hpc", "local"]
    write(path, pool("mine", "local"))
    assert list(load().pools) == ["mine"]
    write(path, pool("local", "slurm"))
    assert [(p.name, p.kind) for p in load().pools.values()] == [("local", "slurm")]


def test_the_first_file_wins_in_the_order_of_the_places(places):
    order = [
        "home/project/hybrid.yaml",
        "user/hybrid.yaml",
        "user/hybrid.d/10.yaml",
        "user/hybrid.d/20.yaml",
        "system1/hybrid.yaml",
        "system1/hybrid.d/x.yaml",
        "system2/hybrid.yaml",
    ]
    for number, name in enumerate(order):
        write(places / name, f"default: only{number}\n" + pool("common") + f"  only{number}: {{kind: slurm}}\n")
    write(places / "user/hybrid.d/notes.txt", "no: yaml of ours")
    for number in range(len(order)):
        found = load()
        assert found.files == tuple(places / name for name in order[number:])
        assert found.default == f"only{number}"
        assert found.pools["common"].source == f"{places / order[number]}:3"
        assert list(found.pools) == ["common", *(f"only{n}" for n in range(number, len(order))), "local"]
        (places / order[number]).unlink()


def test_the_project_file_is_the_nearest_one_up_to_the_home_directory(places):
    write(places / "hybrid.yaml", pool("above-home"))
    deep = places / "home/project/deep/er"
    assert load(deep).files == ()
    write(places / "home/hybrid.yaml", pool("home"))
    assert load(deep).pool().name == "home"
    write(places / "home/project/hybrid.yaml", pool("project"))
    assert load(deep).pool().name == "project"
    assert list(load(str(deep)).pools) == ["project", "local"]
    assert load(places / "system1").pool().name == "above-home"  # outside home the search goes up to the root


def test_a_project_file_in_the_users_configuration_folder_is_read_once(places):
    path = write(places / "user/hybrid.yaml", pool("hpc"))
    assert load(places / "user").files == (path,)


def test_a_deleted_current_folder_has_no_project_file(places, monkeypatch):
    gone = places / "home/gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert list(load().pools) == ["local"]


def test_the_variable_names_the_only_file(places, monkeypatch):
    write(places / "home/project/hybrid.yaml", pool("project"))
    only = write(places / "home/only.yaml", pool("only"))
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", "~/only.yaml")
    assert load().files == (only,)
    assert list(load().pools) == ["only", "local"]
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", "")
    assert list(load().pools) == ["project", "local"]
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(places / "none.yaml"))
    with pytest.raises(ConfigError, match=re.escape(f"{places}/none.yaml: cannot be read: No such file")):
        load()


def test_the_default_pool_is_the_key_else_the_first_of_the_first_file(places):
    write(places / "user/hybrid.yaml", pool("b"))
    write(places / "system1/hybrid.yaml", "default: c\n" + pool("c"))
    assert load().pool().name == "c"
    write(places / "system1/hybrid.yaml", pool("c"))
    assert load().pool().name == "b"
    assert load().pool("c").name == "c"


def test_the_default_may_name_a_pool_of_another_file_or_the_built_in_one(places):
    write(places / "home/project/hybrid.yaml", "default: hpc\n")
    write(places / "system1/hybrid.yaml", pool("other") + "  hpc: {kind: slurm}\n")
    assert load().pool().name == "hpc"
    write(places / "home/project/hybrid.yaml", "default: local\n")
    assert load().pool().source == "built-in"


def test_a_default_that_is_no_pool_is_told_with_its_line(places):
    text = "# mine\n" + pool("cluster") + "default: clutser\n"
    assert problems(places, text) == ["5: default: no pool 'clutser'; did you mean 'cluster'?; pools: cluster, local"]


def test_an_unknown_pool_lists_the_pools(places):
    path = write(places / "user/hybrid.yaml", pool("cluster"))
    with pytest.raises(ConfigError) as error:
        load().pool("clster")
    assert str(error.value) == f"no pool 'clster'; did you mean 'cluster'?; pools: cluster, local (from {path})"
    path.unlink()
    with pytest.raises(ConfigError, match=r"^no pool 'zzz'; pools: local \(from no configuration file\)$"):
        load().pool("zzz")


def test_the_first_of_a_kind_or_how_to_define_one(places):
    path = places / "user/hybrid.yaml"
    with pytest.raises(ConfigError) as error:
        load().first_of_kind("slurm")
    assert str(error.value).startswith("no pool of kind 'slurm'; pools: local (local). Define one in hybrid.yaml")
    assert f"in {path}:\n" in str(error.value)
    write(path, str(error.value).partition(":\n")[2])  # what the message shows is a file that works
    assert load().first_of_kind("slurm").name == "my-slurm"
    write(path, pool("one") + "  two: {kind: slurm}\n")
    assert load().first_of_kind("slurm").name == "one"
    assert load().first_of_kind("local").name == "local"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "{}", "pools: {}\n", "\ufeff# a byte order mark\n"])
def test_an_empty_file_is_no_error(places, text):
    write(places / "home/project/hybrid.yaml", text)
    assert list(load().pools) == ["local"]


def test_merged_mappings_work_and_their_own_keys_win(places):
    text = """\
pools:
  cpu: &cpu
    kind: slurm
    speed: 2
    storage: /s
  gpu: &gpu
    <<: *cpu
    speed: 3
  both: {<<: [*gpu, *cpu], storage: /t}
  again: *gpu
"""
    write(places / "home/project/hybrid.yaml", text)
    found = [(p.name, p.speed, p.storage) for p in load().pools.values() if p.kind == "slurm"]
    assert found == [("cpu", 2.0, "/s"), ("gpu", 3.0, "/s"), ("both", 3.0, "/t"), ("again", 3.0, "/s")]


IN_POOL = [
    ("stroage: /x", "4: pools.hpc.stroage: unknown key 'stroage'; did you mean 'storage'? (known: kind, resources, "),
    ("memory: 8G", "4: pools.hpc.memory: unknown key 'memory'; it belongs under 'resources'"),
    ("storage: 5", "4: pools.hpc.storage: must be text, not 5; put it in quotes if it is meant"),
    ("python: 3.11", "4: pools.hpc.python: must be text, not 3.11; put it in quotes if it is meant"),
    ("storage: ~", "4: pools.hpc.storage: has no value"),
    ("storage: here", "4: pools.hpc.storage: 'here' must be an absolute folder or a URL"),
    ("storage: [/a]", "4: pools.hpc.storage: must be a single value, not a list"),
    ("storage: $NO_SUCH/x", "4: pools.hpc.storage: environment variable 'NO_SUCH' in '$NO_SUCH/x' is not set"),
    ("python: '${NO_SUCH}'", "4: pools.hpc.python: environment variable 'NO_SUCH' in '${NO_SUCH}' is not set"),
    ("python: ''", "4: pools.hpc.python: '' is empty or has a line break"),
    ('python: "a\\0b"', "4: pools.hpc.python: has a NUL character"),
    ("speed: fast", "4: pools.hpc.speed: 'fast' is not a number of at least 0"),
    ("speed: 0", "4: pools.hpc.speed: '0' must be more than zero"),
    ("speed: .nan", "4: pools.hpc.speed: '.nan' is not a number"),
    ("speed: inf", "4: pools.hpc.speed: 'inf' is not a number"),
    ("speed: yes", "4: pools.hpc.speed: 'yes' is not a number"),
    ("speed: {}", "4: pools.hpc.speed: must be a single value, not a mapping"),
    ("resources: 4", "4: pools.hpc.resources: must be a mapping of keys to values, not '4'"),
    ("resources:", "4: pools.hpc.resources: must be a mapping of keys to values, not nothing"),
    ("resources: {\n      cpus: 2,\n      memory: 8Q}", "6: pools.hpc.resources.memory: memory '8Q' is not an amount"),
    ("resources: {memry: [8]}", "4: pools.hpc.resources.memry: unknown resource 'memry'; did you mean 'memory'?"),
    ("resources: {time: 1y}", "4: pools.hpc.resources.time: time '1y' is not a duration"),
    ("resources: {cpus: 0}", "4: pools.hpc.resources.cpus: cpus '0' is not a whole number of at least 1"),
    ("resources: {cpus: true}", "4: pools.hpc.resources.cpus: cpus 'true' is not a whole number"),
    ("resources: {cpus: 1, cpus_per_task: 2}", "4: pools.hpc.resources: cpus is given twice"),
    ("resources: {partition: }", "4: pools.hpc.resources.partition: has no value"),
    ("resources: {extra: [a]}", "4: pools.hpc.resources.extra: must be a mapping of keys to values, not a list"),
    ("resources: {extra: {a: [b]}}", "4: pools.hpc.resources.extra.a: must be a single value, not a list"),
    ("limits: {max_job: 1}", "4: pools.hpc.limits.max_job: unknown key 'max_job'; did you mean 'max_jobs'?"),
    ("limits: {max_jobs: 1.5}", "4: pools.hpc.limits.max_jobs: '1.5' is not a whole number of at least 1"),
    ("limits: {max_array: 0}", "4: pools.hpc.limits.max_array: '0' is not a whole number of at least 1"),
    ("limits: {poll_min: 5 parsecs}", "4: pools.hpc.limits.poll_min: time '5 parsecs' is not a duration"),
    ("limits: {poll_min: 1min}", "4: pools.hpc.limits: poll_min (0:01:00) is longer than poll_max (0:00:30)"),
    ("prices: {cpu_hours: 1}", "4: pools.hpc.prices.cpu_hours: unknown key 'cpu_hours'; did you mean 'cpu_hour'?"),
    ("prices: {gpu_hour: -1}", "4: pools.hpc.prices.gpu_hour: '-1' is not a number of at least 0"),
    ("prologue: {a: b}", "4: pools.hpc.prologue: must be a single value, not a mapping"),
    ("prologue: [a, [b]]", "4: pools.hpc.prologue: must be a single value, not a list"),
    ("environment: [A]", "4: pools.hpc.environment: must be a mapping of keys to values, not a list"),
    ("environment:\n      A: 1\n      B-C: 2", "6: pools.hpc.environment.B-C: is no name of an environment variable"),
    ("env: {A: }", "4: pools.hpc.env.A: has no value"),
    ("container: {kind: docker, image: a}", "4: pools.hpc.container.kind: unknown kind 'docker' (known: apptainer, "),
    ("container: {kind: aptainer, image: a}", "4: pools.hpc.container.kind: unknown kind 'aptainer'; did you mean 'ap"),
    ("container: {bind: [/a]}", "4: pools.hpc.container: needs an image"),
    ("container: {image: [a]}", "4: pools.hpc.container.image: must be a single value, not a list"),
    ("container: [a]", "4: pools.hpc.container: must be a mapping of keys to values, not a list"),
    ("kind: local", "4: duplicate key 'kind', first in line 3"),
    ("? [a]\n    : b", "4: pools.hpc.?: a key must be a word, not a list"),
]


@pytest.mark.parametrize(("line", "problem"), IN_POOL, ids=[line for line, _ in IN_POOL])
def test_a_wrong_value_is_named_with_file_line_and_key(places, line, problem):
    found = problems(places, f"pools:\n  hpc:\n    kind: slurm\n    {line}\n    # the end\n")
    assert len(found) == 1
    assert found[0].startswith(problem)


IN_FILE = [
    ("pool: {}", "1: pool: unknown key 'pool'; did you mean 'pools'? (known: default, pools)"),
    ("[a]", "1: must be a mapping of keys to values, not a list"),
    ("hello", "1: must be a mapping of keys to values, not 'hello'"),
    ("pools: [a]", "1: pools: must be a mapping of keys to values, not a list"),
    ("pools:\n\n  a: slurm", "3: pools.a: must be a mapping of keys to values, not 'slurm'"),
    ("pools:\n  a b: {kind: slurm}", "2: pools.a b: a pool's name is up to 64 letters"),
    ("pools:\n  " + "a" * 65 + ": {kind: slurm}", f"2: pools.{'a' * 65}: a pool's name is up to 64"),
    ("pools:\n  a: {speed: 1}", "2: pools.a: needs a kind: "),
    ("pools:\n  a: {kind: slrum}", "2: pools.a.kind: unknown kind 'slrum'; did you mean 'slurm'? (known: "),
    ("pools:\n  a: {kind: local, cpus: many}", "2: pools.a.cpus: 'many' is not a whole number of at least 1"),
    ("pools:\n  a: {kind: local, memory: 8Q}", "2: pools.a.memory: memory '8Q' is not an amount"),
    ("pools:\n  a: {kind: slurm}\n  a: {kind: local}", "3: duplicate key 'a', first in line 2"),
    ("pools:\n  a: {kind: slurm\n", "3: malformed YAML: expected ',' or '}', but got '<stream end>'"),
    ("pools:\n  a:\n\tkind: slurm", "3: malformed YAML: found character '\\t' that cannot start any token"),
    ("pools: {}\n---\npools: {}", "2: malformed YAML: but found another document"),
    ("pools:\n  a: *b", "2: malformed YAML: found undefined alias 'b'"),
    ("pools:\n  a: {<<: 3, kind: slurm}", "2: malformed YAML: expected a mapping or list of mappings for merging"),
    ("pools: {}\n# \x07", "2: malformed YAML: special characters are not allowed"),
    ("default: []", "1: default: must be a single value, not a list"),
]


@pytest.mark.parametrize(("text", "problem"), IN_FILE, ids=[text for text, _ in IN_FILE])
def test_a_wrong_file_is_told_with_its_line(places, text, problem):
    found = problems(places, text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_of_a_file_are_told_at_once_in_order(places):
    text = "pools:\n  a:\n    kind: slrum\n    resources: {memory: 8Q, cpu: 1}\n  b:\n    speed: x\nother: 1\n"
    assert [line.split(": ")[:2] for line in problems(places, text)] == [
        ["3", "pools.a.kind"],
        ["4", "pools.a.resources.cpu"],
        ["4", "pools.a.resources.memory"],
        ["5", "pools.b"],
        ["6", "pools.b.speed"],
        ["7", "other"],
    ]


def test_nothing_in_a_file_is_executed(places):
    mark = places / "executed"
    text = f'pools:\n  a:\n    kind: slurm\n    storage: !!python/object/apply:os.system ["/bin/touch {mark}"]\n'
    assert "4: tag '!!python/object/apply:os.system' is not allowed" in problems(places, text)
    assert not mark.exists()


def test_a_file_that_is_not_utf8_is_told_with_its_line(places):
    (places / "home/project/hybrid.yaml").write_bytes(b"pools: {}\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"hybrid\.yaml:2: not UTF-8 text$"):
        load()


def test_deep_nesting_and_mappings_that_contain_themselves_end_in_an_error(places):
    assert problems_without_line(places, "[" * 5000) == "malformed YAML: nested too deeply"
    assert problems(places, "pools: &a\n  b: *a\n")[0].startswith("2: pools.b.b: unknown key 'b'")
    assert problems(places, "pools:\n  a: &a {<<: *a}\n")[0].startswith("2: pools.a: needs a kind")


def problems_without_line(places, text):
    path = write(places / "home/project/hybrid.yaml", text)
    with pytest.raises(ConfigError) as error:
        load()
    return str(error.value).removeprefix(f"{path}: ")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150, deadline=None
)
@given(st.data())
def test_any_damage_to_a_file_gives_a_configuration_or_a_config_error(places, data):
    start = data.draw(st.integers(0, len(FULL)))
    end = data.draw(st.integers(start, min(start + 8, len(FULL))))
    put = data.draw(st.text(st.sampled_from("&*!|>{}[]:,?-#'\"\n\t %@~<0a\0é"), max_size=4))
    write(places / "home/project/hybrid.yaml", FULL[:start] + put + FULL[end:])
    try:
        assert isinstance(load(), Config)
    except ConfigError as error:
        assert str(error).startswith(f"{places}/home/project/hybrid.yaml:")  # noqa: PT017 - either outcome is right


def test_importing_config_loads_neither_yaml_nor_jupyter():
    code = "import sys, jupyter_hybrid.config; print({'yaml', 'jupyter_core'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_without_a_file_yaml_is_not_loaded():
    code = "import sys; from jupyter_hybrid.config import load; print(load().files, 'yaml' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "() False\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's file")
def test_a_file_that_anybody_could_have_left_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "hybrid.yaml").write_text("pools: {}\n")
    load(folder)
    os.chown(folder / "hybrid.yaml", 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        load(folder)
