"""What ComfyUI's registry reads of the project, and that it is true."""

import re
import xml.etree.ElementTree as ET

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_name_is_one_that_the_registry_takes(project):
    name = project["project"]["name"]
    assert re.fullmatch(r"[a-z]+([-_.][a-z0-9]+)*", name) and len(name) < 100
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["tool"]["comfy"]["PublisherId"] and project["tool"]["comfy"]["DisplayName"]


def test_no_machine_is_excluded(project):
    """A manager reports a conflict where a classifier names another system or accelerator."""
    systems = [
        classifier
        for classifier in project["project"]["classifiers"]
        if classifier.startswith(("Operating System ::", "Environment ::"))
    ]
    assert systems == ["Operating System :: OS Independent"]


def test_the_icon_is_a_square_picture_of_the_size_that_the_registry_takes(project):
    url, repository = project["tool"]["comfy"]["Icon"], project["project"]["urls"]["Repository"]
    owner = repository.removeprefix("https://github.com/")
    prefix = f"https://raw.githubusercontent.com/{owner}/main/"
    assert url.startswith(prefix)
    icon = ET.parse(ROOT / url.removeprefix(prefix)).getroot()
    assert icon.tag == "{http://www.w3.org/2000/svg}svg"
    assert icon.get("width") == icon.get("height") and int(icon.get("width", 0)) <= 400


def test_the_oldest_comfyui_is_the_one_that_is_tested(project):
    oldest = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    for place in (".github/workflows/ci.yml", "docs/development.md"):
        assert f"v{oldest}" in (ROOT / place).read_text(encoding="utf-8")
    assert f"ComfyUI {oldest} and later" in (ROOT / "README.md").read_text(encoding="utf-8")
