"""TCA's reservoir: the released streams, interrupted and frozen, and what its policies keep."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.decoder_by_hand import golden, golden_names
from support.tca_views import layout

from vlmtok.errors import ParameterError
from vlmtok.mergers.reservoir import Reservoir, evict, layer_weights
from vlmtok.mergers.tca import TCA


def run_stream(method, data, memory, order, gain=10.0):
    """Logits of some pictures of a stream, one by one."""
    weights, out = data["text_weights"].T.contiguous(), []
    for t in order:
        row = {f"cls.{layer}": token.unsqueeze(0) for layer, token in enumerate(data["cls_tokens"][t])}
        row["features"], row["text_features"] = data["features"][t : t + 1], weights
        out.append(method.finish(gain * data["features"][t : t + 1] @ data["text_weights"], row, memory)[0])
    return torch.stack(out)


def of_stream(data, **settings):
    known = {
        "reservoir_size": data["size"],
        "policy": "diversity" if data["div"] else "similarity",
        "similarity": "tokens" if data["token_sim"] else "features",
        "scale": data["scale"],
        "lambd": data["lambd"],
        "beta": data["beta"],
    }
    method = TCA(**{**known, **settings})
    return method, method.build(layout())


@pytest.mark.parametrize("name", golden_names("tca_stream_*.npz"))
def test_stream_equals_the_release(name):
    data = golden(name)
    method, memory = of_stream(data)
    for t in range(len(data["pred"])):
        out = run_stream(method, data, memory, [t], data["logit_scale"])
        assert torch.equal(memory.ids, data["buffer_ids"][t])
        torch.testing.assert_close(out[0], data["final"][t], atol=1e-5, rtol=0)
        assert int(memory.anchored.sum()) == data["n_anchors"][t]
        assert memory.active == (data["n_anchors"][t] > 0)
        if memory.active:
            torch.testing.assert_close(memory.anchors, data["anchors"][t], atol=1e-6, rtol=0)


def test_interrupted_stream_goes_on_identically():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    run_stream(method, data, memory, range(17))
    other = Reservoir(3)
    other.load_state_dict({name: value.clone() for name, value in memory.state_dict().items()})
    assert other.active == memory.active and torch.equal(other.anchors, memory.anchors)
    expected = run_stream(method, data, memory, range(17, 40))
    assert torch.equal(run_stream(method, data, other, range(17, 40)), expected)
    with pytest.raises(ParameterError, match="items a class"):
        Reservoir(2).load_state_dict(memory.state_dict())


def test_an_empty_reservoir_loads_too():
    memory = Reservoir(3)
    memory.load_state_dict(Reservoir(3).state_dict())
    data = golden("tca_stream_01.npz")
    method, fresh = of_stream(data)
    assert torch.equal(run_stream(method, data, memory, range(5)), run_stream(method, data, fresh, range(5)))


def test_reset_starts_anew():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    first = run_stream(method, data, memory, range(20))
    memory.reset()
    assert memory.classes == 0 and not memory.active
    assert torch.equal(run_stream(method, data, memory, range(20)), first)


def test_frozen_reservoir_changes_nothing_and_is_order_free():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    run_stream(method, data, memory, range(20))
    memory.frozen = True
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    forth = run_stream(method, data, memory, range(20, 30))
    back = run_stream(method, data, memory, reversed(range(20, 30))).flip(0)
    assert torch.equal(forth, back)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
    empty, memory = of_stream(data, update=False)
    assert memory.frozen
    logits = 10.0 * data["features"][:1] @ data["text_weights"]
    assert torch.equal(run_stream(empty, data, memory, [0]), logits)


def test_batches_update_in_order():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data, batch_mode="synchronous")
    one_by_one = run_stream(method, data, method.build(layout()), range(24))
    for start in range(0, 24, 6):
        some = slice(start, start + 6)
        row = {f"cls.{layer}": data["cls_tokens"][some, layer] for layer in range(12)}
        out = method.finish(10.0 * data["features"][some] @ data["text_weights"], row, memory)
        torch.testing.assert_close(out, one_by_one[some])
    with pytest.raises(ParameterError, match="synchronous"):
        TCA().finish(torch.zeros(2, 4), {"cls.0": torch.zeros(2, 8)}, Reservoir(3))


def test_another_list_of_classes_is_refused():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    run_stream(method, data, memory, range(3))
    other = {**data, "text_weights": data["text_weights"].flip(1)}
    with pytest.raises(ParameterError, match="class embeddings"):
        run_stream(method, other, memory, [3])
    fewer = {**data, "text_weights": data["text_weights"][:, :2]}
    with pytest.raises(ParameterError, match="holds 4 classes"):
        run_stream(method, fewer, memory, [3])
    loaded = Reservoir(3)
    loaded.load_state_dict(memory.state_dict())
    with pytest.raises(ParameterError, match="class embeddings"):
        run_stream(method, other, loaded, [3])
    memory.reset()
    run_stream(method, other, memory, [3])


def test_self_vote_adds_lambda_to_the_prediction():
    data = golden("tca_stream_01.npz")
    own, alone = of_stream(data)[0], of_stream(data, include_self=False)[0]
    logits = 10.0 * data["features"][:1] @ data["text_weights"]
    label = int(logits.argmax())
    expected = logits[0].clone()
    expected[label] += own.lambd
    torch.testing.assert_close(run_stream(own, data, own.build(layout()), [0])[0], expected)
    assert torch.equal(run_stream(alone, data, alone.build(layout()), [0])[0], logits[0])
    a, b = own.build(layout()), alone.build(layout())
    difference = run_stream(own, data, a, range(40)) - run_stream(alone, data, b, range(40))
    # A picture that entered votes once with full weight, one that was let go at once does not.
    held = {t: data["buffer_ids"][t].eq(t).any().item() for t in range(40)}
    for t in range(40):
        moved = torch.zeros(4)
        moved[data["pred"][t]] = own.lambd if held[t] else 0.0
        torch.testing.assert_close(difference[t], moved, atol=1e-5, rtol=0)


def test_anchor_gate():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data, anchor_gate="per_class")
    for t in range(40):
        run_stream(method, data, memory, [t])
        held = (data["buffer_ids"][t] >= 0).sum(1)
        assert torch.equal(memory.anchored, held >= 2)
    assert Reservoir(3, "per_class").gate == "per_class"


def test_policies():
    entropy = torch.tensor([0.3, 0.9, 0.9, 0.1])
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [1.0, 0.2]])
    ids = torch.tensor([7, 3, 9, 5])
    assert evict(entropy, vectors, ids, "fifo") == 1
    assert evict(entropy, vectors, ids, "entropy") == 1
    assert evict(entropy, vectors, ids, "diversity") == 1
    assert evict(torch.zeros(4), vectors, ids, "similarity") == 0  # equal entropies: a weight of 0
    assert evict(entropy, vectors.expand(4, 2), ids, "similarity") in (1, 2)
    same = torch.ones(3, 2)
    for policy in ("diversity", "similarity", "entropy"):
        assert evict(torch.full((3,), 0.5), same, torch.arange(3), policy) == 0


def test_two_items_are_equally_alike():
    torch.manual_seed(0)
    for _ in range(100):
        for policy in ("diversity", "similarity"):
            assert evict(torch.zeros(2), torch.randn(2, 16) + 1, torch.arange(2), policy) == 0


def test_paper_policy_keeps_the_most_certain():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data, policy="entropy")
    run_stream(method, data, memory, range(40))
    for c in range(4):
        mine = [t for t in range(40) if data["pred"][t] == c]
        best = sorted(mine, key=lambda t: (data["entropy"][t].item(), t))[:3]
        assert memory.ids[c].tolist() == best + [-1] * (3 - len(best))


def test_correction_as_in_the_paper_is_a_mean_of_cosines():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data, correction="mean", policy="fifo")
    out = run_stream(method, data, memory, range(12))
    t, weights = 11, layer_weights(12, method.scale)
    expected = 10.0 * data["features"][t] @ data["text_weights"]
    for c in range(4):
        for i in memory.ids[c].tolist():
            if i >= 0:
                a = F.cosine_similarity(data["cls_tokens"][t], data["cls_tokens"][i], -1)
                expected[c] += method.lambd * float((a.double() * weights).sum()) / 3
    torch.testing.assert_close(out[-1], expected, atol=1e-5, rtol=0)


def test_layer_weights():
    for scale in (0.01, 0.1, 1.0, 5.5):
        weights = layer_weights(12, scale)
        assert weights.dtype == torch.float64 and float(weights.sum()) == pytest.approx(1)
        assert weights[1] / weights[0] == pytest.approx(math.exp(1 / 11 / scale))


def test_nan_logits_change_nothing():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    run_stream(method, data, memory, range(5))
    before = memory.state_dict()
    row = {f"cls.{i}": data["cls_tokens"][5, i].unsqueeze(0) for i in range(12)}
    assert method.finish(torch.full((1, 4), float("nan")), row, memory).isnan().all()
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def test_one_class_works():
    data = golden("tca_stream_01.npz")
    data["text_weights"] = data["text_weights"][:, :1]
    method, memory = of_stream(data)
    out = run_stream(method, data, memory, range(8))
    assert out.isfinite().all() and memory.ids.shape == (1, 3) and memory.active


def test_features_are_needed_where_items_are_compared_by_them():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data, similarity="features")
    run_stream(method, data, memory, range(40))
    assert memory.features.shape == (4, 3, 16)
    row = {"cls.0": torch.zeros(1, 16)}
    with pytest.raises(ParameterError, match=r"row\['features'\]"):
        method.finish(torch.zeros(1, 4), row, memory)
    with pytest.raises(ParameterError, match="no class tokens"):
        method.finish(torch.zeros(1, 4), {}, memory)
    logits = torch.randn(1, 4)
    assert TCA(reservoir_size=0).finish(logits, {}, None) is logits


def test_inference_mode_leaves_a_reservoir_that_works_outside():
    data = golden("tca_stream_01.npz")
    method, memory = of_stream(data)
    with torch.inference_mode():
        inside = {key: value.clone() if torch.is_tensor(value) else value for key, value in data.items()}
        run_stream(method, inside, memory, range(6))
    other = Reservoir(3)
    other.load_state_dict(memory.state_dict())
    memory.load_state_dict(other.state_dict())
    memory.vocabulary.zero_()
    memory._known = None
    fresh = method.build(layout())
    run_stream(method, data, fresh, range(6))
    assert torch.equal(run_stream(method, data, memory, range(6, 40)), run_stream(method, data, fresh, range(6, 40)))
