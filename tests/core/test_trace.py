"""Traces: which patch went where, through towers, the projector and the language model."""

import pytest
import torch

import vlmtok
from vlmtok import Site
from vlmtok.core.trace import PictureTrace
from vlmtok.errors import ParameterError, PassError


def vit():
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, img_size=64, num_classes=4, embed_dim=48).eval()


@torch.no_grad()
def test_tower_sources_agree_with_sizes():
    model, images = vit(), torch.randn(3, 3, 64, 64)
    with vlmtok.compress(model, vlmtok.ToMe(r=2), trace=True) as run:
        model(images)
        trace = run.trace()
    assert len(trace) == 3 and all(picture.grid == (4, 4) for picture in trace.pictures)
    for picture in trace.pictures:
        assert picture.kept == 16 - 4 * 2
        assert [site.layer for site, _ in picture.steps] == [0, 1, 2, 3]
        sizes = picture.group_sizes()
        assert all(sizes[i] == (picture.owner == picture.owner[i]).sum() for i in range(16))
        assert picture.dropped_at() == [None] * 16


@torch.no_grad()
def test_dropped_patches_name_the_site():
    model = vit()
    with vlmtok.compress(model, vlmtok.Random(keep=5, stage="vision", layer=1), trace=True) as run:
        model(torch.randn(1, 3, 64, 64))
    picture = run.trace()[0]
    assert picture.kept == 5
    assert [site for site in picture.dropped_at() if site is not None] == [Site("vision", 1, "end")] * 11


def test_unmerge_spreads_slots_over_patches():
    picture = PictureTrace(torch.tensor([0, 0, -1, 3]), (), (2, 2))
    spread = picture.unmerge(torch.tensor([[1.0], [2.0]]))
    assert spread[:, 0].tolist() == [1.0, 1.0, 0.0, 2.0]
    with pytest.raises(ParameterError, match="2 slots"):
        picture.unmerge(torch.zeros(3, 1))


def test_asking_without_trace_or_pass_is_refused():
    model = vit()
    with torch.no_grad(), vlmtok.compress(model, vlmtok.ToMe(r=2)) as run:
        model(torch.randn(1, 3, 64, 64))
        with pytest.raises(ParameterError, match="trace=True"):
            run.trace()
    run = vlmtok.compress(model, vlmtok.ToMe(r=2), trace=True)
    with pytest.raises(PassError, match="call the model"):
        run.trace()
    vlmtok.remove(model)


@torch.no_grad()
def test_a_prompt_follows_its_patches_from_the_tower_to_the_last_layer():
    from support.models import IMAGE, PLACEHOLDERS, llava

    model = llava()
    text = torch.arange(5, 9)
    ids = torch.cat([text, torch.full((PLACEHOLDERS,), IMAGE), text, torch.full((PLACEHOLDERS,), IMAGE), text])[None]
    side = model.config.vision_config.image_size
    methods = [
        vlmtok.ToMe(r=2),
        vlmtok.Random(keep=0.5),
        vlmtok.Random(keep=0.5, stage="decoder", layer=2),
    ]
    with vlmtok.compress(model, methods, trace=True) as run:
        model.generate(input_ids=ids, pixel_values=torch.randn(2, 3, side, side), max_new_tokens=2, do_sample=False)
        trace = run.trace()
    assert len(trace) == 2
    for picture in trace.pictures:
        stages = [site.stage for site, _ in picture.steps]
        assert stages == sorted(stages, key=["vision", "projected", "decoder"].index) and set(stages) == {
            "vision",
            "projected",
            "decoder",
        }
        left = [int((owner >= 0).sum()) for _, owner in picture.steps]
        assert left == sorted(left, reverse=True) and left[-1] < left[0] == PLACEHOLDERS
        merged = int(picture.steps[stages.index("projected") - 1][1].unique().numel())
        half = vlmtok.keep_count(0.5, merged)
        assert picture.kept == vlmtok.keep_count(0.5, half)
        for (_, before), (_, after) in zip(picture.steps, picture.steps[1:]):
            assert not ((before < 0) & (after >= 0)).any()  # what is gone does not come back
            for slot in after[after >= 0].unique():  # merged patches stay together
                group = before[after == slot]
                assert (before[torch.isin(before, group)] >= 0).all()
