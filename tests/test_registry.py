"""Registries: found without importing, named with their nearest names, refused twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from space.component import components, declaration
from space.registry import Registry, SpecError

FILE = '''
raise RuntimeError("the scan imports nothing")

@part("shape", "square")
class Square:
    """Four equal sides.

    And more.
    """
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / f"parts_of_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_scan_reads_names_and_summaries_without_importing(package: Path):
    (package / "square.py").write_text(FILE)
    registry = Registry("part", package=package.name)
    assert registry.names("shape") == ("square",)
    assert registry.summary("shape", "square") == "Four equal sides."
    with pytest.raises(RuntimeError, match="the scan imports nothing"):
        registry.get("shape", "square")


def test_two_files_cannot_register_one_name(package: Path):
    (package / "square.py").write_text(FILE)
    (package / "square_again.py").write_text(FILE)
    with pytest.raises(RuntimeError, match="shape/square is registered in both"):
        Registry("part", package=package.name).names("shape")


def test_one_name_is_added_once(package: Path):
    registry: Registry[type] = Registry("part", package=package.name)
    registry.add(("shape", "round"), object)
    with pytest.raises(RuntimeError, match="registered twice"):
        registry.add(("shape", "round"), object)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(SpecError, match=r"unknown mixer 'atention'; did you mean 'attention'.*known: .*window_attention"):
        declaration("mixer", "atention")


def test_listing_components_imports_no_torch():
    code = (
        "import sys; from space.component import components;"
        "print(components.names('mixer'), components.summary('norm', 'layer_norm'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "attention" in done.stdout
    assert "LayerNorm" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_every_component_has_a_summary():
    from space.component import KINDS

    for kind in KINDS:
        for name in components.names(kind):
            assert components.summary(kind, name), f"{kind} {name}"
