"""Set-up: when tasks.py installs and when it does not. No environment is really made here."""

import importlib.util

import pytest

from tests.paths import ROOT


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """tasks.py in a folder of its own, with commands recorded in `ran` instead of run."""
    spec = importlib.util.spec_from_file_location("tasks_under_test", ROOT / "tasks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("as first written")
    ran = []

    def run(*command):
        ran.append(" ".join(str(part) for part in command))
        if "venv" in command:
            python = module.python_of(tmp_path / ".venv")
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "ran", ran, raising=False)
    return module


def set_up(tasks):
    tasks.ran.clear()
    tasks.environment(tasks.ROOT / ".venv", "constraints.txt", "dev")
    return [next(word for word in ("venv", "pip") if f"-m {word}" in line) for line in tasks.ran]


def test_the_first_run_makes_an_environment_and_the_second_does_nothing(tasks):
    assert set_up(tasks) == ["venv", "pip"]
    assert set_up(tasks) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(tasks, name):
    set_up(tasks)
    (tasks.ROOT / name).write_text("changed")
    assert set_up(tasks) == ["pip"]


def test_an_interrupted_installation_starts_anew(tasks, monkeypatch):
    record = tasks.run

    def interrupted(*command):
        record(*command)
        if "pip" in command:
            raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_up(tasks)
    monkeypatch.setattr(tasks, "run", record)
    assert set_up(tasks) == ["venv", "pip"]


def test_a_failing_command_ends_with_its_code(monkeypatch):
    spec = importlib.util.spec_from_file_location("tasks_under_test", ROOT / "tasks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ended:
        module.run(module.sys.executable, "-c", "raise SystemExit(3)")
    assert ended.value.code == 3
