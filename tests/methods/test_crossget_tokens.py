"""Cross tokens: where they start, how they learn, how they are loaded and handed on."""

import pytest
import torch

from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError
from vlmtok.mergers.crossget import CrossGET, cross_loss, cross_tokens


def start_view(method, memory, stage, layer, protected, inserted, row):
    signals = {"protected": protected, "inserted": inserted}
    return TokenView(
        torch.zeros(len(protected), 5, 6), Site(stage, layer, "start"), signals=signals, row=row, memory=memory
    )


def made(**settings):
    method = CrossGET(guidance="cross", **settings)
    plan = Layout("by hand", {n: StageLayout(3, 6, 1, 2, provides=tower_signals(1)) for n in ("vision", "text")})
    return method, method.build(plan)


def test_untrained_cross_token_is_the_class_token():
    method, memory = made(rl=0)
    assert {n: list(p.shape) for n, p in memory.named_parameters()} == {
        "cross_image": [1, 3, 6],
        "cross_text": [1, 3, 6],
    }
    protected, before = torch.randn(2, 2, 6), torch.randn(2, 1, 6)
    first = method.insert(start_view(method, memory, "vision", 0, protected, None, {}))
    assert torch.equal(first, protected[:, :1])
    assert torch.equal(method.insert(start_view(method, memory, "vision", 1, protected, before, {})), before)
    assert torch.equal(method.insert(start_view(method, memory, "text", 1, protected, before, {})), protected[:, :1])


def test_cross_tokens_learn_and_load():
    torch.manual_seed(0)
    method, memory = made(rl=0)
    protected = torch.randn(4, 1, 6, requires_grad=True)
    texts = torch.randn(4, 1, 6)
    optimiser = torch.optim.Adam(memory.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        image, text = {}, {}
        before = None
        for layer in range(3):
            before = method.insert(start_view(method, memory, "vision", layer, protected, before, image))
            method.insert(start_view(method, memory, "text", layer, texts, None, text))
        loss = cross_loss(cross_tokens(image), cross_tokens(text))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert protected.grad is None  # what the cross token was is detached
    assert losses[-1] < 0.5 * losses[0]
    _, other = made(rl=0)
    other.load_state_dict(memory.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(memory.parameters(), other.parameters()))


def test_cross_tokens_come_layer_by_layer():
    row = {f"cross.{layer}": torch.full((2, 1, 3), float(layer)) for layer in (10, 0, 9)}
    assert cross_tokens(row)[:, 0].tolist() == [0, 0, 9, 9, 10, 10]
    with pytest.raises(ParameterError, match="no cross token"):
        cross_tokens({})
    with pytest.raises(ParameterError, match="as many"):
        cross_loss(torch.zeros(2, 3), torch.zeros(4, 3))


def test_llava_hands_the_cross_token_on():
    method = CrossGET.preset("llava")
    protected, tokens = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    view = TokenView(tokens, Site("features"), signals={"protected": protected})
    reduction = method.reduce(view)
    out, size = reduction.apply(tokens, None, protected)
    assert torch.equal(out, torch.cat([tokens, protected[:, 2:]], 1))
    assert size.tolist() == [[1.0] * 6 + [0.0]] * 2
    assert method.count(view.counts) == reduction.slots == 7
