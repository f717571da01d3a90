"""Models by name, string and file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from space import catalog
from space.cost import cost
from space.families.as_vit import ASVIT_LARGE, spec, topology_space
from space.model import supports_class_row
from space.registry import SpecError
from space.timm_spec import TimmSpec


@pytest.mark.parametrize("name", catalog.names())
def test_every_named_model_has_a_spec_and_a_line(name: str):
    assert catalog.resolve(name).digest
    assert catalog.summary(name)
    assert "\n" not in catalog.summary(name)


def test_listing_imports_no_torch():
    code = "import sys; from space import catalog; print([catalog.summary(name) for name in catalog.names()], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_counting_a_spec_imports_no_timm():
    code = (
        "import sys; from space.catalog import resolve; from space.cost import cost;"
        "cost(resolve('as_vit_seed')); print('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_method_string_is_resolved():
    assert catalog.resolve(f"as_vit:{ASVIT_LARGE}") == catalog.resolve("as_vit_large") == spec(ASVIT_LARGE, img_size=224)
    with pytest.raises(SpecError, match="K1 is 9"):
        catalog.resolve("as_vit:9,2,3|4,1,2|4,1,4|4,1,6|32")


def test_a_timm_model_is_resolved_at_the_size_of_its_weights():
    assert catalog.resolve("timm:swinv2_tiny_window8_256") == TimmSpec(name="swinv2_tiny_window8_256", img_size=256, num_classes=1000)
    with pytest.raises(SpecError, match="unknown timm model 'resnet_18'; did you mean 'resnet18'"):
        catalog.resolve("timm:resnet_18")


@pytest.mark.parametrize(
    ("name", "img_size", "num_tokens", "embed_dim", "depth", "hidden_dim"),
    [("vit_digits", 16, 17, 48, 4, 96), ("vit_cifar", 32, 65, 256, 6, 1024)],
)
def test_small_vits_have_the_size_they_say(name: str, img_size: int, num_tokens: int, embed_dim: int, depth: int, hidden_dim: int):
    model = catalog.resolve(name)
    assert (model.img_size, model.depth, model.num_classes) == (img_size, depth, 10)
    block = 4 * embed_dim**2 + 2 * embed_dim * hidden_dim + 4 * embed_dim + embed_dim + hidden_dim + 4 * embed_dim
    ends = 4 * 4 * 3 * embed_dim + embed_dim + (1 + num_tokens) * embed_dim + 2 * embed_dim + 10 * (embed_dim + 1)
    assert cost(model).params == depth * block + ends
    assert supports_class_row(model) is None


def test_a_file_holds_a_spec_or_a_candidate(tmp_path: Path):
    space = topology_space(img_size=224, proxy_img_size=64, num_classes=10)
    candidate = space.decode(next(space.points()))
    for name, data in (("spec.json", candidate.model.to_json()), ("candidate.json", candidate.to_json())):
        (tmp_path / name).write_text(json.dumps(data))
        assert catalog.resolve(str(tmp_path / name)) == candidate.model
    convnext = catalog.resolve("convnext_cifar")
    (tmp_path / "timm.json").write_text(json.dumps(convnext.to_json()))
    assert catalog.resolve(str(tmp_path / "timm.json")) == convnext


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deit_smal", "unknown model 'deit_smal'; did you mean 'deit_small'.*reduced:STRING, sn_net:STRING, vit_resnas:STRING, timm:NAME"),
        ("absent.json", "absent.json: .*No such file"),
        ("vit:8,2,3", "unknown model"),
    ],
)
def test_what_names_no_model_is_answered_with_the_nearest(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        catalog.resolve(text)


def test_a_file_that_is_no_spec_is_named(tmp_path: Path):
    file = tmp_path / "other.json"
    for content in ("[1, 2]", '{"model": "arch"}', '{"model": {"model": "timm"}}', "\xff"):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(SpecError, match=r"other.json: "):
            catalog.resolve(str(file))
