"""`vlmtok.loading`: models, skeletons, pictures, devices and files, and what cannot be had."""

import pytest
import torch
from PIL import Image
from support.checkpoints import llava, picture

from vlmtok import loading
from vlmtok.loading import LoadError


def test_a_skeleton_holds_no_data(tmp_path):
    folder = str(llava(tmp_path, layers=1))
    bare = loading.skeleton(folder)
    assert bare.language and bare.processor is None
    assert {p.device.type for p in bare.model.parameters()} == {"meta"}
    for name in ("timm:vit_tiny_patch16_224", "open_clip:ViT-S-32-alt"):
        assert {p.device.type for p in loading.skeleton(name).model.parameters()} == {"meta"}


def test_random_weights_and_dtypes(tmp_path):
    folder = str(llava(tmp_path, layers=1))
    trained, drawn = loading.load(folder), loading.load(folder, random=True, dtype="bfloat16")
    assert trained.trained and trained.dtype == torch.float32 and not trained.model.training
    assert not drawn.trained and drawn.dtype == torch.bfloat16
    weight = "model.language_model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(trained.model.get_parameter(weight), drawn.model.get_parameter(weight).float())


def test_the_form_of_attention_is_asked_of_transformers(tmp_path):
    folder = str(llava(tmp_path, layers=1))
    assert loading.load(folder).model.config._attn_implementation == "sdpa"
    assert loading.load(folder, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(LoadError, match="cannot load"):
        loading.load(folder, attn_implementation="nonsense")
    for name, random in (("timm:vit_tiny_patch16_224", False), (folder, True)):
        with pytest.raises(LoadError, match="is for checkpoints of transformers"):
            loading.load(name, random=random, attn_implementation="eager")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("three/part/name", "no such folder"),
        ("timm:vit_tiny_patch16_22", "nearest: vit_tiny_patch16_224"),
        ("open_clip:ViT-B-3", "nearest: ViT-B-32"),
        ("open_clip:ViT-B-32:nowhere", "no trained weights 'nowhere'"),
        ("owner/model", "HF_HUB_OFFLINE is set"),
    ],
)
def test_models_that_cannot_be_had(name, what, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=what) as problem:
        loading.load(name)
    assert "\n" not in str(problem.value)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(LoadError, match=r"no config\.json"):
        loading.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "frobnicator"}')
    with pytest.raises(LoadError, match="cannot load") as problem:
        loading.load(str(tmp_path))
    assert "frobnicator" in str(problem.value) and "\n" not in str(problem.value)


def test_pictures(tmp_path):
    upright = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    picture(120, 90).save(upright, exif=exif)
    assert loading.open_picture(upright).size == (90, 120)
    picture().convert("RGBA").save(tmp_path / "alpha.png")
    assert loading.open_picture(tmp_path / "alpha.png").mode == "RGB"
    (tmp_path / "words.png").write_text("no picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    for name, what in (("words.png", "no picture"), ("half.png", "cannot read"), ("none.png", "no such file")):
        with pytest.raises(LoadError, match=what):
            loading.open_picture(tmp_path / name)


def test_files_that_cannot_be_written(tmp_path):
    assert loading.check_writable(tmp_path / "overlay.png", picture=True) == tmp_path / "overlay.png"
    assert not (tmp_path / "overlay.png").exists()
    (tmp_path / "file").write_text("")
    for name, what in (("none/x.png", "no folder"), ("file/x.png", "no folder"), (".", "it is a folder")):
        with pytest.raises(LoadError, match=what):
            loading.check_writable(tmp_path / name)
    with pytest.raises(LoadError, match=r"use \.png"):
        loading.check_writable(tmp_path / "overlay.txt", picture=True)


def test_devices_and_dtypes_that_do_not_exist():
    with pytest.raises(LoadError, match="device 'frob'"):
        loading.pick_device("frob")
    with pytest.raises(LoadError, match="dtype 'int8'"):
        loading.pick_dtype("int8", torch.device("cpu"))
    assert loading.pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert loading.pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
