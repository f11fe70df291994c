"""Clips in every family that has them: frames and cells in views, and video methods against the oracle."""

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.hosts_of import cache_of, with_cache

import vlmtok
from vlmtok import EVS, ToDRE, VidCom2
from vlmtok.errors import ParameterError

from .build import FAMILIES, shared
from .harness import NOISE, batch, generate
from .methods import Look
from .oracle import Cut, oracle
from .prompts import FIRST_FRAME, write
from .shots import packed_clip

WITH_CLIPS = [name for name, family in FAMILIES.items() if family.clips]
FRAMES_AS_PICTURES = ["internvl", "smolvlm"]
"""Families whose processors write the frames of a video as pictures of the prompt."""
STEPS = 3


def model_of(name):
    return shared(name, FAMILIES[name].attentions[0])


def seen(name, scope, inputs):
    look = Look(scope)
    with vlmtok.compress(model_of(name), look):
        generate(model_of(name), inputs, 1)
    return look.seen


def frames_of(name, picture):
    """Columns of each frame of a clip; a picture's own columns as one."""
    parts = torch.tensor(picture.shot.parts or (FIRST_FRAME if picture.shot.video else 0,) * len(picture.shot))
    if name == "instructblipvideo":  # as many placeholders a frame as there are queries
        frames = len(picture.shot.arrays["pixel_values"][0])
        parts = torch.arange(len(parts)) // (len(parts) // frames) + FIRST_FRAME
    return [picture.columns[parts == part] for part in parts.unique().tolist() if part >= FIRST_FRAME]


def clips_of(name):
    """(row, columns of each frame) of all clips of a batch."""
    prompts = batch(name, "clips").prompts
    found = [(row, p) for row, prompt in enumerate(prompts) for p in prompt.pictures if p.shot.video]
    return [(row, frames_of(name, picture)) for row, picture in found]


@pytest.mark.parametrize("name", WITH_CLIPS)
def test_views_know_frames_and_cells(name):
    """A clip is T frames of M cells one behind the other, its separators aside; pictures have no frames."""
    found = seen(name, "clip", batch(name, "clips").inputs())
    clips = sorted((len(frames), len(frames[0]), torch.cat(frames).tolist()) for _, frames in clips_of(name))
    assert clips
    assert sorted((*one.clip, one.columns.tolist()) for one in found if one.clip[0]) == clips
    assert all((one.part >= 0).all() for one in found)
    pictures = sum(len(prompt.pictures) for prompt in batch(name, "clips").prompts)
    assert len(found) == pictures and sum(one.clip == (0, 0) for one in found) == pictures - len(clips)


@pytest.mark.parametrize("name", WITH_CLIPS)
def test_a_view_row_can_be_a_frame(name):
    """Budgets for each frame, and for each picture whole."""
    found = [one.columns.tolist() for one in seen(name, "frame", batch(name, "clips").inputs())]
    frames = [frame.tolist() for _, frames in clips_of(name) for frame in frames]
    assert all(frame in found for frame in frames)
    assert len(found) - len(frames) == sum(
        not p.shot.video for prompt in batch(name, "clips").prompts for p in prompt.pictures
    )


@pytest.mark.parametrize("name", FRAMES_AS_PICTURES)
def test_pictures_of_one_size_are_frames_of_a_sample(name):
    prompt = FAMILIES[name].prompt("2I3I1I4", 5)
    (one,) = seen(name, "sample", FAMILIES[name].collect(prompt).inputs())
    assert one.clip == (3, len(prompt.pictures[0].columns))


@pytest.mark.parametrize("seconds", [1.0, 0.25, 0.1])
def test_frames_equal_in_time_do_not_collapse(seconds):
    """Qwen2.5-VL counts whole seconds: above two frames a second all of them have one time."""
    family, model = FAMILIES["qwen2_5_vl"], model_of("qwen2_5_vl")
    inputs = family.collect(family.prompt("3V2", 4)).inputs()
    look = Look("clip")
    with vlmtok.compress(model, look):
        generate(model, {**inputs, "second_per_grid_ts": torch.tensor([seconds])}, 1)
    (one,) = look.seen
    assert one.clip == (3, 4) and one.part.tolist() == [frame for frame in (1, 2, 3) for _ in range(4)]


# ---------------------------------------------------------------------- against the oracle
def changes(clip):
    """EVS's scores of a clip `[T, M, C]`, in float64 and by loops."""
    clip = clip.double()
    scores = [[255.0] * clip.shape[1]]
    for before, now in pairwise(clip):
        scores.append([1.0 - float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(before, now)])
    return torch.tensor(scores).flatten()


def redundancies(clip):
    """VidCom2's scores of a clip, negated so that more is better, and budgets by frame; float64."""
    clip = clip.double()
    variance = clip.flatten(0, 1).var(0, correction=0)
    y = F.normalize(clip[..., variance.argsort(stable=True)[: max(1, clip.shape[-1] // 2)].sort().values], dim=-1)

    def alike(centre):
        square = (y - centre).square().sum(-1)
        return sum((-square / (2 * width)).exp() for width in (0.125, 0.25, 0.5, 1.0, 2.0))

    whole, inside = alike(y.mean((0, 1))), alike(y.mean(1, keepdim=True))
    weight = (-whole.mean(1) / 0.01).softmax(0)
    return -(whole + inside), weight


def chosen_by_evs(clip, rate):
    score = changes(clip)
    count = max(clip.shape[1], int(len(score) * (1.0 - rate)))
    order = score.argsort(descending=True, stable=True)
    gap = float("inf") if count == len(score) else float(score[order[count - 1]] - score[order[count]])
    return order[:count].sort().values, gap


def chosen_by_vidcom2(clip, rate):
    score, weight = redundancies(clip)
    frames, cells = score.shape
    shares = ((1 - rate) * (1 + weight - 1 / frames)).clamp(max=1.0) * cells
    gap = float((shares % 1 - 0.5).abs().min())
    kept = []
    for t, share in enumerate(shares.tolist()):
        take = max(1, round(share))
        values, order = score[t].sort(descending=True, stable=True)
        gap = gap if take == cells else min(gap, float(values[take - 1] - values[take]))
        kept += (t * cells + order[:take]).tolist()
    flat, count = score.flatten(), max(frames, int(score.numel() * (1.0 - rate)))
    ranked = sorted(range(len(flat)), key=lambda i: (i not in kept, -float(flat[i])))
    return torch.tensor(sorted(ranked[:count])), gap


CHOOSE = {"evs": (EVS, chosen_by_evs), "vidcom2": (VidCom2, chosen_by_vidcom2)}


class Close(Exception):
    """A choice hangs on rounding."""


def clip_oracle(name, method, prompts, rate):
    """The oracle of a family, and cuts for each prompt by the definition; all but clips stays.

    Raises:
        Close: a choice hangs on rounding.
    """
    choose = CHOOSE[method][1]

    def cutting(prompt):
        clips = [frames_of(name, picture) for picture in prompt.pictures if picture.shot.video]

        def cut(row, _):
            stays = torch.ones(len(row), dtype=torch.bool)
            for frames in clips:
                kept, gap = choose(torch.stack([row.hidden[frame] for frame in frames]), rate)
                if gap < 1e-5:
                    raise Close
                columns = torch.cat(frames)
                stays[columns] = False
                stays[columns[kept]] = True
            left = row.take(stays.nonzero()[:, 0])
            if FAMILIES[name].positions == "1d" and len(left) < len(row):
                left = replace(left, positions=row.positions.min() + torch.arange(len(left))[None])
            return left

        return cut

    asked, found = oracle(name, shared(name, "eager")), []
    for prompt in prompts:
        asked.cut = cutting(prompt)
        found.append(functools.partial(asked.generate, prompt, (Cut(0.5),)))
        found[-1](1)
    return asked, [cutting(prompt) for prompt in prompts]


@functools.cache
def case(name, method, rate, patterns=None):
    """A batch with clips on which no choice hangs on rounding."""
    for seed in range(40):
        made = FAMILIES[name].batch(*(patterns or FAMILIES[name].clips), seed=seed)
        try:
            asked, cuts = clip_oracle(name, method, made.prompts, rate)
        except Close:
            continue
        return made, asked, cuts
    raise AssertionError("every seed has a choice that hangs on rounding")


def said_by_oracle(asked, cuts, prompts, steps, forced=None):
    rows = []
    for i, (prompt, cut) in enumerate(zip(prompts, cuts)):
        asked.cut = cut
        rows.append(asked.generate(prompt, (Cut(0.5),), steps, None if forced is None else forced[i]))
    return torch.stack([tokens for tokens, _ in rows]), torch.stack([logits for _, logits in rows])


@pytest.mark.parametrize("method", CHOOSE)
@pytest.mark.parametrize("name", WITH_CLIPS)
def test_video_methods_equal_the_oracle(name, method):
    """Clips are cut by the definition, positions behind them are right, pictures beside them stay."""
    made, asked, cuts = case(name, method, 0.5)
    tokens, logits = said_by_oracle(asked, cuts, made.prompts, STEPS)
    model = model_of(name)
    with vlmtok.compress(model, CHOOSE[method][0](rate=0.5), trace=True) as run:
        found = generate(model, made.inputs(), STEPS)
        traced = run.trace().pictures
    assert (found[1] - logits).abs().max() < NOISE
    assert torch.equal(found[0], tokens)
    assert all(one.kept == one.patches for one in traced if not one.video)
    assert any(one.kept < one.patches for one in traced if one.video)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v", "llava_onevision"])
def test_a_second_turn_behind_a_clip(name):
    """More text on the kept cache: positions go on behind the uncut clip where they are places (M-RoPE).

    Not of Qwen2.5-VL: its own count begins the turn where time ends, not where its answer did.
    """
    made, asked, cuts = case(name, "evs", 0.5, FAMILIES[name].clips[:1])
    model, inputs = model_of(name), made.inputs()
    more = torch.stack([FAMILIES[name].prompt("5", 7 + row).ids for row in range(len(made.prompts))])
    with vlmtok.compress(model, EVS(rate=0.5)), torch.no_grad():
        given = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        first = model.generate(**inputs, **given)
        written = first.sequences[:, -4:]
        said = torch.cat([written, more], 1)
        forced = torch.cat([said, said[:, :1]], 1)
        _, logits = said_by_oracle(asked, cuts, made.prompts, forced.shape[1], forced)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1)
        second = {"input_ids": said[:, 3:], "attention_mask": mask, **with_cache(model, cache_of(first))}
        found = generate(model, second, 1)
    assert (found[1][:, 0] - logits[:, -1]).abs().max() < NOISE


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "glm4v"])
def test_a_cut_in_front_is_refused_in_words(name):
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    methods = [ToDRE(keep=0.5), EVS(rate=0.5)]
    with pytest.raises(ParameterError, match="put EVS in front of methods that cut"), vlmtok.compress(model, methods):
        generate(model, batch(name, "clips").inputs(), 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with vlmtok.compress(model, methods[::-1]):
        generate(model, batch(name, "clips").inputs(), 1)


@pytest.mark.parametrize("name", FRAMES_AS_PICTURES)
def test_frames_written_as_pictures(name):
    """``source="pictures"``: the pictures of a prompt are one clip; unequal ones are refused in words."""
    family, model = FAMILIES[name], model_of(name)
    inputs = family.collect(family.prompt("2I3I1I4", 5)).inputs()
    with vlmtok.compress(model, EVS(rate=0.5, source="pictures"), trace=True) as run:
        generate(model, inputs, 1)
        kept = [one.kept for one in run.trace().pictures]
    size = len(family.prompt("2I3I1I4", 5).pictures[0].columns)
    assert kept[0] == size and sum(kept) == max(size, int(3 * size * 0.5))


def test_packed_clips_of_many_sizes():
    """Groups of clips with equal tokens and other frames do not share a view."""
    family, model = FAMILIES["qwen2_5_vl"], model_of("qwen2_5_vl")
    shots = {"V": packed_clip(2, 2, 4, "run"), "W": packed_clip(4, 2, 2, "run")}
    prompts = [write("2V3", shots, 1), write("2W3", shots, 2)]
    look = Look("clip")
    with vlmtok.compress(model, look):
        generate(model, family.collect(*prompts).inputs(), 1)
    assert sorted(one.clip for one in look.seen) == [(2, 8), (4, 4)]
