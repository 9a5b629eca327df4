"""Towers of each kind against what their blocks give, and which of them load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.vision.colours import colour_histograms, figure
from llama_adapter.vision.tower import VisionTower, load_tower
from tests.refusals import refusal
from tests.tiny_models import build_tiny_tower_folder

KINDS = {
    # Kind to its depths and to those that are taken where nothing is asked for.
    "vit": (2, (1, 2)),
    "resnet": (5, (2, 3, 4, 5)),
    "cnn": (6, (2, 3, 5, 6)),
    "cnn pooled by attention": (6, (2, 3, 5, 6)),
    "timm vit": (6, (2, 3, 5, 6)),
    "timm vit with registers": (8, (2, 4, 6, 8)),
    "siglip": (9, (3, 5, 7, 9)),
    "late class token": (12, (3, 6, 9, 12)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {kind: build_tiny_tower_folder(root / kind) if kind == "vit" else root / kind for kind in KINDS}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A tower that a test may break."""
    return Path(shutil.copytree(folders["vit"], tmp_path / "mine"))


def tower_refusal(name: str | Path, **kwargs: Any) -> str:
    """The one line with which a tower is refused."""
    return refusal(lambda: load_tower(str(name), **kwargs))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


# --- features -----------------------------------------------------------------------------------------------


def layers_of(kind: str, visual: Any) -> list[nn.Module]:
    """What has a depth's vector as its output, lowest first."""
    if kind == "vit":
        return list(visual.transformer.resblocks)
    if kind == "resnet":
        return [visual.avgpool, visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if "cnn" in kind:
        return [*visual.trunk.blocks, visual.trunk.bn2]
    return list(visual.trunk.blocks)


def vector_of(kind: str, output: Tensor) -> Tensor:
    """A layer's output for one picture as one vector."""
    if output.ndim == 3:  # width and height
        return output.flatten(1).sum(1) / (output.shape[1] * output.shape[2])
    if kind in ("vit", "timm vit"):
        return output[0]
    patches = output[1:] if kind in ("timm vit with registers", "siglip") else output
    return sum(patches) / len(patches)


def plain_features(kind: str, tower: VisionTower, pixels: Tensor, depths: Sequence[int]) -> Tensor:
    """Pixels of one picture (3, S, S) -> its features, from what the layers give in an ordinary pass."""
    given: list[Tensor] = []
    layers = layers_of(kind, tower.visual)
    hooks = [layer.register_forward_hook(lambda *args: given.append(args[2][0])) for layer in layers]
    try:
        tower.visual(pixels[None])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(given) == len(layers)
    vectors = [vector_of(kind, given[depth - 1].clone()) for depth in depths]
    return torch.cat([vector / torch.sqrt((vector * vector).mean()) for vector in vectors])


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_layers_give(kind: str, folders: dict[str, Path]) -> None:
    tower = load_tower(str(build_tiny_tower_folder(folders[kind], kind)))
    count, default = KINDS[kind]
    assert tower.depths == default
    size = tower.visual.image_size
    pixels = torch.randn(3, 3, *([size] * 2 if isinstance(size, int) else size))
    features = tower.encode(pixels)
    assert features.shape == (3, tower.feature_width) and features.dtype == torch.float32
    for row, picture in zip(features, pixels, strict=True):
        torch.testing.assert_close(
            row, plain_features(kind, tower, picture, tower.depths), rtol=1e-5, atol=1e-5
        )
    assert (features[0] - features[1]).abs().max() > 1e-2, "else this shows nothing"

    some = (1, count)
    again = VisionTower(tower.visual, name="again", depths=some)
    expected = plain_features(kind, again, pixels[0], some)
    torch.testing.assert_close(again.encode(pixels[:1])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_tower_is_frozen_and_stays_in_evaluation_mode(kind: str, folders: dict[str, Path]) -> None:
    tower = load_tower(str(build_tiny_tower_folder(folders[kind], kind)))
    pixels = tower.prepare(pictures((20, 30), (30, 20)))
    before = tower.encode(pixels)
    nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert torch.equal(tower.encode(pixels.requires_grad_()), before) and not before.requires_grad
    torch.testing.assert_close(tower.encode(pixels[:1]), before[:1])  # no picture depends on the others


def test_pictures_are_prepared_as_its_config_says(tmp_path: Path) -> None:
    says = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "resize_mode": "squash"}
    tower = load_tower(str(build_tiny_tower_folder(tmp_path, **says)))
    [picture] = pictures((16, 16))
    values = tensor_of(picture)
    mean, std = (torch.tensor(says[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(tower.prepare([picture])[0], (values - mean) / std)
    assert tower.prepare(pictures((16, 16), (7, 90), (1, 1))).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("depths", [(), (0, 3), (3,), (-2, 1), (0, -1), (2, 1), (1, 1)])
def test_depths_that_it_does_not_have_are_refused(folder: Path, depths: tuple[int, ...]) -> None:
    message = tower_refusal(folder, depths=depths)
    assert (
        "has the depths 1 to 2, 0 (the picture's colours) and -1 (what stands out from its border)" in message
    )
    assert (", ".join(map(str, depths)) or "none") in message


def test_depths_0_and_minus_1_are_what_the_pixels_tell_without_the_tower(folder: Path) -> None:
    towers = [load_tower(str(folder), depths=depths) for depths in ((-1, 0, 2), (-1,), (0,), (2,))]
    image = Image.new("RGB", (16, 16), "white")
    image.paste("red", (4, 4, 12, 12))
    pixels = towers[0].prepare([image, *pictures((16, 16))])
    features, *alone = (tower.encode(pixels) for tower in towers)
    assert features.shape[1] == towers[0].feature_width
    assert torch.equal(features, torch.cat(alone, dim=1))
    plain = torch.stack([tensor_of(image), tensor_of(pictures((16, 16))[0])])
    torch.testing.assert_close(alone[0], figure(plain), rtol=1e-4, atol=1e-4)
    colours = colour_histograms(plain)  # of length sqrt(2), since both histograms' shares add up to 1
    torch.testing.assert_close(alone[1], colours * (colours.shape[1] / 2) ** 0.5, rtol=1e-4, atol=1e-4)


def test_a_tower_that_shows_no_depths_is_refused() -> None:
    with pytest.raises(UsageError, match="'mine': open_clip can't read depths of a Linear"):
        VisionTower(nn.Linear(1, 1), name="mine")


def test_a_thin_picture_loses_its_ends_and_takes_no_more_memory(folders: dict[str, Path]) -> None:
    tower = load_tower(str(folders["vit"]))
    long = Image.new("RGB", (3000, 2), "red")
    long.paste("blue", (1480, 0, 1520, 2))
    middle = long.crop((1480, 0, 1520, 2))
    [seen], [expected] = tower.prepare([long]), tower.prepare([middle])
    assert torch.equal(seen, expected)
    tall = Image.new("RGB", (1, 1_000_000), "red")
    assert tower.prepare([tall]).shape == tower.prepare([Image.new("RGB", (8, 8))]).shape
    wide = pictures((40, 2))[0]
    assert torch.equal(tower.prepare([wide]), tower.transform(wide)[None]), "20:1 is left as it is"


def test_a_tower_in_the_weights_folders_goes_by_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", str(folder), f"local-dir:{folder}", "./mine"):
        assert load_tower(name, weights=tmp_path).name == "mine"
    assert load_tower("mine", weights=tmp_path / "elsewhere").name == str(folder)


# --- the fingerprint ----------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_and_the_preparation(tmp_path: Path) -> None:
    one, same, other, prepared = (
        load_tower(str(build_tiny_tower_folder(tmp_path / name, seed=seed, **preprocess)))
        for name, seed, preprocess in (
            ("one", 0, {}),
            ("same", 0, {}),
            ("other", 1, {}),
            ("prepared", 0, {"mean": [0.1, 0.2, 0.3]}),
        )
    )
    assert one.fingerprint == same.fingerprint and len(one.fingerprint) == 16
    assert len({tower.fingerprint for tower in (one, other, prepared)}) == 3
    # Other heads, or another activation, by the same weights.
    for name, where, change in (
        ("heads", "vision_cfg", {"head_width": 4}),
        ("activation", None, {"quick_gelu": True}),
    ):
        config_file = build_tiny_tower_folder(tmp_path / name) / "open_clip_config.json"
        config = json.loads(config_file.read_text())
        (config["model_cfg"][where] if where else config["model_cfg"]).update(change)
        config_file.write_text(json.dumps(config))
        assert load_tower(str(tmp_path / name)).fingerprint != one.fingerprint
    less = load_tower(str(tmp_path / "one"), depths=(2,))
    assert less.fingerprint == one.fingerprint and less.key != one.key
    with torch.no_grad():
        one.visual.conv1.weight[0, 0, 0, 0] += 1e-6
    assert VisionTower(one.visual, name="nudged").fingerprint != same.fingerprint


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_tower_is_found_by_folder_by_name_and_by_open_clips_prefix(folders: dict[str, Path]) -> None:
    folder = folders["vit"]
    expected = load_tower(str(folder))
    for name in (folder.name, f"local-dir:{folder.name}", f"local-dir:{folder}"):
        tower = load_tower(name, weights=folder.parent)
        assert tower.name == "vit" and tower.key == expected.key


def test_one_of_open_clips_own_is_found_by_its_tag(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked: dict[str, Any] = {}
    create = open_clip.create_model

    def create_model(**kwargs: Any) -> Any:
        asked.update(kwargs)
        return create(f"local-dir:{folders['vit']}")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    assert load_tower("ViT-B-32:openai").name == "ViT-B-32:openai"
    assert (asked["model_name"], asked["pretrained"]) == ("ViT-B-32", "openai")
    assert asked.pop("force_quick_gelu") is True, "OpenAI's were trained with it"
    load_tower("ViT-B-32:laion2b_s34b_b79k")
    assert "force_quick_gelu" not in asked
    with monkeypatch.context() as patch:
        config = json.loads((folders["vit"] / "open_clip_config.json").read_text())["model_cfg"]
        patch.setattr(open_clip, "get_model_config", lambda name: config)
        load_tower("someone/their-clip")
    assert asked["model_name"] == "hf-hub:someone/their-clip"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", "no tower 'nothing'"),
        ("", "the tower is empty"),
        ("local-dir:/none/at/all", "no tower '/none/at/all'"),
        ("ViT-B-32", "one of open_clip's own; say whose weights, such as ViT-B-32:openai"),
        ("ViT-B-32:nonsense", "tower 'ViT-B-32:nonsense' cannot be loaded: "),
        ("nothing:openai", "no tower 'nothing:openai'"),
        ("someone/their-clip", "tower 'someone/their-clip' cannot be loaded: "),
        ("ViT-B-32:laion2b_s34b_b79k", "tower 'ViT-B-32:laion2b_s34b_b79k' cannot be loaded: "),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name: str, expected: str, tmp_path: Path) -> None:
    assert expected in tower_refusal(name, weights=tmp_path)


def test_a_gated_tower_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/clip"))
        raise GatedRepoError("Access is restricted.\nLog in.", response=response)

    monkeypatch.setattr("open_clip.create_model", refuse)
    assert "accept its terms on its hub page, then run `hf auth login`" in tower_refusal("owner/clip")


DAMAGE = {
    "no config": lambda folder: (folder / "open_clip_config.json").unlink(),
    "config cut off": lambda folder: (folder / "open_clip_config.json").write_text('{"model_cfg": '),
    "config of another kind": lambda folder: (folder / "open_clip_config.json").write_text("[]"),
    "config without a model": lambda folder: (folder / "open_clip_config.json").write_text("{}"),
    "no weights": lambda folder: (folder / "open_clip_model.safetensors").unlink(),
    "weights cut off": lambda folder: (folder / "open_clip_model.safetensors").write_bytes(
        (folder / "open_clip_model.safetensors").read_bytes()[:-100]
    ),
    "no safetensors": lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b"not weights"),
    "an unknown option": lambda folder: change(folder, "vision_cfg", {"surprise": 1}),
    "another width": lambda folder: change(folder, "vision_cfg", {"width": 24}),
    "no such network": lambda folder: change(folder, "vision_cfg", {"timm_model_name": "nothing"}),
    "a size of zero": lambda folder: change(folder, "vision_cfg", {"patch_size": 0}),
}


def change(folder: Path, part: str, values: dict[str, Any]) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= values
    path.write_text(json.dumps(config))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    message = tower_refusal(folder)
    assert f"tower {str(folder)!r} cannot be loaded: " in message
    assert not message.endswith(": ")


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.INFO)
    yield caplog.messages


def test_loading_says_nothing_and_leaves_the_log_as_it_was(folder: Path, heard: list[str]) -> None:
    before = logging.getLogger().level
    load_tower(str(folder))
    (folder / "open_clip_model.safetensors").unlink()
    tower_refusal(folder)
    assert logging.getLogger().level == before == logging.INFO
    assert not heard
