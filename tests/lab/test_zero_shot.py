"""`vlmtok.zero_shot`: classification with a compressed dual encoder, and logits that methods correct."""

import pytest
import torch
import torch.nn.functional as F
from support import openai_clip
from support.tca_by_hand import STREAMS, stream

import vlmtok

CLASSES, WIDTH = 4, 32


def open_clip_model():
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 48, "patch_size": 8, "width": 48, "layers": 4, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    return open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text).eval()


def hf_model():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 48, "patch_size": 8}, text_config=tower, projection_dim=WIDTH
    )
    return CLIPModel(config).eval()


MODELS = {"open_clip": open_clip_model, "transformers": hf_model}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def encode(model, images):
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    return model.get_image_features(pixel_values=images).pooler_output


@pytest.fixture
def images():
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def names():
    return torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_bare_logits_are_scaled_cosines(model, images, names):
    logits = vlmtok.zero_shot(model, None, names)(images)
    cosine = F.normalize(encode(model, images), dim=-1) @ F.normalize(names, dim=-1).T
    torch.testing.assert_close(logits, model.logit_scale.exp() * cosine)
    torch.testing.assert_close(vlmtok.zero_shot(model, None, names, logit_scale=2.0)(images), 2.0 * cosine)


@torch.no_grad()
def test_a_plain_method_changes_features_only(model, images, names):
    bare = vlmtok.zero_shot(model, None, names)(images)
    with vlmtok.compress(model, vlmtok.ToMe(r=4)) as run:
        logits = vlmtok.zero_shot(model, run, names)(images)
        wanted = model.logit_scale.exp() * F.normalize(encode(model, images), dim=-1) @ F.normalize(names, dim=-1).T
    torch.testing.assert_close(logits, wanted)
    assert not torch.allclose(logits, bare, atol=1e-3)


@torch.no_grad()
def test_tca_adapts_over_a_stream_and_starts_again_after_reset(model, images, names):
    with vlmtok.compress(model, vlmtok.TCA(ratio=0.7, layers=(1, 2))) as run:
        classify = vlmtok.zero_shot(model, run, names)
        first = classify(images)
        again = classify(images)
        assert not torch.allclose(first, again)  # the reservoir has seen them now
        state = {key: value.clone() for key, value in run.state_dict().items()}
        third = classify(images)
        run.reset()
        torch.testing.assert_close(classify(images), first)
        run.load_state_dict(state)
        torch.testing.assert_close(classify(images), third)
        with pytest.raises(vlmtok.errors.VlmtokError):
            vlmtok.zero_shot(model, run, torch.randn(CLASSES + 1, WIDTH))(images)


@torch.no_grad()
def test_condensation_alone_needs_no_classes(model, images, names):
    with vlmtok.compress(model, vlmtok.TCA(ratio=0.7, layers=(1, 2), reservoir_size=0)) as run:
        one = vlmtok.zero_shot(model, run, names)(images)
        torch.testing.assert_close(vlmtok.zero_shot(model, run, names)(images), one)


def test_what_is_no_dual_encoder_is_refused(names):
    with pytest.raises(vlmtok.errors.UnsupportedModel, match="Linear"):
        vlmtok.zero_shot(torch.nn.Linear(2, 2), None, names)
    with pytest.raises(vlmtok.errors.ParameterError, match="classes, E"):
        vlmtok.zero_shot(open_clip_model(), None, names[0])


# ---------------------------------------------------------------------- TCA's streams, through the core
LIBRARIES = {"open_clip": openai_clip.open_clip_of, "transformers": openai_clip.transformers_of}


def tower_of(data, library):
    return LIBRARIES[library]({key[3:]: value for key, value in data.items() if key.startswith("sd.")}, data["heads"])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_a_stream_equals_its_reference(name, library):
    """Condensation, anchors, reservoir and correction in a real model: the logits of every picture in turn."""
    data = stream(name)
    model = tower_of(data, library)
    names = data["text_weights"].T
    method = vlmtok.TCA(drop_rate=data["drop_rate"], scale=1.0, lambd=3.0, beta=5.0)
    anchored = []
    with vlmtok.compress(model, method) as run:
        classify = vlmtok.zero_shot(model, run, names, logit_scale=100.0)
        for t, picture in enumerate(data["images"]):
            method.first = tuple(data["first"][t].tolist())  # what the release drew at random
            logits = classify(picture[None])
            torch.testing.assert_close(logits[0], data["final"][t].float(), atol=2e-4, rtol=0)
            anchored.append(int(run.memory().anchored.sum()))
        bare = F.normalize(encode(model, data["images"][:1]), dim=-1) @ F.normalize(names, dim=-1).T
    assert anchored == data["nanch"].tolist() and anchored[-1] > 0
    assert (100.0 * bare[0] - data["final"][0]).abs().max() > 1.0  # the correction is no small thing


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_a_stream_that_is_saved_frozen_or_given_other_classes(library):
    data = stream("plain loops")
    model, names = tower_of(data, library), data["text_weights"].T
    method = vlmtok.TCA(drop_rate=data["drop_rate"], scale=1.0)
    images = data["images"]
    with vlmtok.compress(model, method) as run:
        classify = vlmtok.zero_shot(model, run, names)
        classify(images[:9])
        state = {key: value.clone() for key, value in run.state_dict().items()}
        wanted = classify(images[9:])
    with vlmtok.compress(model, vlmtok.TCA(drop_rate=data["drop_rate"], scale=1.0)) as run:
        run.load_state_dict(state)
        classify = vlmtok.zero_shot(model, run, names)
        torch.testing.assert_close(classify(images[9:]), wanted)
        with pytest.raises(vlmtok.errors.ParameterError, match="reset"):
            vlmtok.zero_shot(model, run, names.flip(0))(images[:1])
        run.memory().frozen = True
        once = classify(images[:4])
        torch.testing.assert_close(classify(images[:4].flip(0)).flip(0), once)
    with vlmtok.compress(model, vlmtok.TCA(drop_rate=data["drop_rate"], scale=1.0, update=False)) as run:
        run.load_state_dict(state)
        run.memory().frozen = True
        frozen = vlmtok.zero_shot(model, run, names)
        one_by_one = torch.cat([frozen(image[None]) for image in images[9:]])
        torch.testing.assert_close(frozen(images[9:]), one_by_one)
    for mode in ("sequential", "synchronous"):
        with vlmtok.compress(model, vlmtok.TCA(drop_rate=data["drop_rate"], scale=1.0, batch_mode=mode)) as run:
            found = vlmtok.zero_shot(model, run, names)(images)
            assert int(run.memory().seen) == len(images) and found.shape == (len(images), len(names))
