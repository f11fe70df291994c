"""Random: late layers, and what its budget is meant for."""

import pytest
import torch
from support.asking import dual, llava

import vlmtok
from vlmtok import Random
from vlmtok.errors import ParameterError
from vlmtok.lab.tiny.families import FAMILIES


def test_a_layer_means_the_language_model():
    """`random:layer=` is a draw inside the decoder; in a lone tower, inside that."""
    (site,) = Random(layer=12).sites(llava())
    assert (site.stage, site.layer, site.point) == ("decoder", 12, "start")
    assert Random().sites(llava())[0].stage == "projected"
    assert (Random(layer=1).sites(dual())[0].stage, Random().sites(dual())[0].layer) == ("vision", 2)
    with pytest.raises(ParameterError, match="'projected' has no layers"):
        Random(stage="projected", layer=3)
    assert Random.version == 2


@pytest.mark.parametrize(
    "method",
    [
        Random(keep=0.5, scope="frame"),
        vlmtok.DivPrune(keep=0.5, scope="frame"),
        vlmtok.ToDRE(keep=0.5, tau=None, scope="frame"),
    ],
)
def test_a_budget_can_be_meant_for_each_frame(method):
    """Half of every frame stays, not half of the clip; a whole picture is one budget."""
    family = FAMILIES["qwen3_vl"]
    model, batch = family.build(), family.batch(*family.clips)
    with vlmtok.compress(model, method, trace=True) as run, torch.no_grad():
        model.generate(**batch.inputs(), max_new_tokens=1)
        found = run.trace()
    shots = [picture.shot for prompt in batch.prompts for picture in prompt.pictures]
    for one, shot in zip(found.pictures, shots, strict=True):
        parts = torch.tensor(shot.parts)
        stays = one.owner >= 0
        for part in parts.unique().tolist():
            assert int(stays[parts == part].sum()) == int(0.5 * (parts == part).sum() + 0.5)
