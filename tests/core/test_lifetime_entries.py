"""Ways into a compressed model: its entry points, lone blocks, and other threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support import models
from support.checks import assert_differs, assert_equal, assert_same
from support.lifetimes import Boom, blocks_of, methods_of, outputs

import vlmtok
from vlmtok.errors import PassError

# ---------------------------------------------------------------------- entry points
ENTRIES = {
    "timm ViT": ("forward_features", lambda m, x: m.forward_features(x)[:, 0]),
    "open_clip CLIP": ("encode_image", lambda m, x: m.encode_image(x)),
    "open_clip CoCa": ("encode_image", lambda m, x: m.encode_image(x)),
    "HF CLIPModel": ("get_image_features", lambda m, x: m.get_image_features(pixel_values=x).pooler_output),
    "HF LLaVA": ("get_image_features", lambda m, x: torch.stack(m.get_image_features(x).pooler_output)),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_direct_entry_points_work_also_right_after_an_exception(name):
    """There is no outermost hook: a pass starts at block 0."""
    _, enter = ENTRIES[name]
    model = models.fresh(name)
    x = models.pictures(2, size=(32, 32) if name == "HF LLaVA" else (48, 48))
    blocks = blocks_of(model)

    def boom(*_):
        raise Boom

    with torch.no_grad():
        bare = enter(model, x)
        with vlmtok.compress(model, "pitome:ratio=0.8"):
            good = enter(model, x)
            assert_differs(good[:, : bare.shape[1]], bare)
            for victim in (blocks[0], blocks[1]):
                handle = victim.register_forward_hook(boom)
                with pytest.raises(Boom):
                    enter(model, x)
                handle.remove()
                assert_same(enter(model, x), good)
                assert_equal(enter(model, x[:1]), good[:1])
        assert_same(enter(model, x), bare)


def test_encode_text_and_the_text_tower_are_left_alone():
    open_clip, hf = models.fresh("open_clip CLIP"), models.fresh("HF CLIPModel")
    ids = torch.tensor([[1, 5, 9, 63, 0, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        bare = open_clip.encode_text(ids), hf.get_text_features(input_ids=ids).pooler_output
        with vlmtok.compress(open_clip, "tome:r=4"), vlmtok.compress(hf, "tome:r=4"):
            found = open_clip.encode_text(ids), hf.get_text_features(input_ids=ids).pooler_output
            open_clip.encode_image(models.pictures(1))
            hf.get_image_features(pixel_values=models.pictures(1))
    assert torch.equal(bare[0], found[0])
    assert torch.equal(bare[1], found[1])


def test_a_lone_block_is_refused_outside_a_pass(vit):
    with vlmtok.compress(vit.model, "tome:r=4"):
        with pytest.raises(PassError, match="block 0"):
            vit.model.blocks[2](torch.randn(1, 37, 32))
        outputs(vit)


def test_blocks_out_of_order_are_refused(vit):
    with torch.no_grad(), vlmtok.compress(vit.model, "tome:r=4"):
        outputs(vit)
        for layer in (1, 3):  # an earlier one, and the last one again
            with pytest.raises(PassError, match=rf"block {layer} .*behind block 3"):
                vit.model.blocks[layer](torch.randn(1, 37, 32))
        outputs(vit)


def test_intermediate_layers_can_be_read_as_rows(vit):
    """forward_intermediates gives shrinking lists; a grid cannot be made of them."""
    x = vit.tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(vit.model, "tome:r=4"):
        final, layers = vit.model.forward_intermediates(x, output_fmt="NLC")
        assert [layer.shape[1] for layer in layers] == [32, 28, 24, 20]
        assert_same(final, vit.model.forward_features(x))


# ---------------------------------------------------------------------- threads
def in_thread(call):
    found = []

    def work():
        try:
            found.append(call())
        except BaseException as problem:
            found.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_pass_may_run_in_any_thread(subject):
    with torch.no_grad(), vlmtok.compress(subject.model, methods_of(subject.name)):
        good = outputs(subject)
        assert_same(in_thread(lambda: outputs(subject)), good)
        assert_same(outputs(subject), good)


def test_a_block_from_another_thread_is_refused(subject):
    """In the middle of a pass a second thread runs one of its blocks."""
    found, open_ = [], True

    def intrude(module, args, kwargs):
        nonlocal open_
        if open_:
            open_ = False
            found.append(in_thread(lambda: module(*args, **kwargs)))

    with vlmtok.compress(subject.model, methods_of(subject.name)):
        good = outputs(subject)
        handle = blocks_of(subject.model)[1].register_forward_pre_hook(intrude, with_kwargs=True, prepend=True)
        result = outputs(subject)
        handle.remove()
        assert isinstance(found[0], PassError), found[0]
        assert "thread" in str(found[0])
        assert_same(result, good, "the pass that was disturbed and one that was not")
        assert_same(outputs(subject), good)


def test_a_second_thread_in_the_middle_of_a_pass_never_mixes(vit):
    """Two passes that overlap: each belongs to its thread, and both are right."""
    x = vit.tower.pictures(3)
    with vlmtok.compress(vit.model, "tome:r=6"):
        good = outputs(vit)
        other = []

        def intrude(module, args):
            if not other:
                other.append(None)
                other[0] = in_thread(lambda: vit.model(x[:1]).detach())

        handle = vit.model.blocks[2].register_forward_pre_hook(intrude, prepend=True)
        with torch.no_grad():
            mine = vit.model(x)
        handle.remove()
        assert_equal(mine, good)
        assert_equal(other[0], good[:1])
        assert_same(outputs(vit), good)


def test_two_copies_serve_two_threads(vit):
    twins = [copy.deepcopy(vit.model) for _ in range(2)]
    for twin in twins:
        vlmtok.compress(twin, "tome:r=6")
    with torch.no_grad():
        alone = [vit.out(twin) for twin in twins]
    found = {}

    def work(at):
        with torch.no_grad():
            for _ in range(20):
                found.setdefault(at, []).append(vit.out(twins[at]))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(2):
        assert len(found[at]) == 20
        assert all(torch.equal(result, alone[at]) for result in found[at])
