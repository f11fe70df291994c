"""torch.compile over a compressed tower: one graph, the results of eager, nothing compiled twice.

`test_lifetime_compiled.py` has what happens when a compression comes and goes around compiled code.
"""

import pytest
import torch
from support.checks import assert_differs, assert_equal
from support.models import TOWERS

import vlmtok
from vlmtok import kernels
from vlmtok.errors import VlmtokWarning

# Removing a compression from compiled code says that it will be compiled again.
pytestmark = pytest.mark.filterwarnings("ignore:vlmtok.remove:vlmtok.errors.VlmtokWarning")

METHODS = ("tome:r=4", "pitome:ratio=0.8", "crossget:rv=3", "random:keep=0.5")
"""Three that merge between attention and MLP, one of them with inserted tokens, and one that prunes."""


@pytest.fixture(autouse=True)
def _forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs a graph as it is, or hands it on, and keeps each graph that Dynamo made."""

    def __init__(self, then="eager"):
        self.found = []
        self.then = torch._dynamo.lookup_backend(then)

    def __call__(self, graph, examples):
        self.found.append(graph)
        return self.then(graph, examples)

    def targets(self):
        """Names of the functions that the graphs call."""
        return [str(node.target) for graph in self.found for node in graph.graph.nodes if node.op == "call_function"]


def compiled(tower, model, backend):
    """What the tower's user calls, in one graph or an error."""
    return torch.compile(lambda pixels: tower.run(model, pixels), fullgraph=True, backend=backend)


CASES = [(name, method) for name in ("timm ViT", "HF CLIP vision") for method in METHODS]
CASES += [("open_clip CLIP", "pitome:ratio=0.8"), ("timm EVA-02", "tome:r=4")]  # another layout; rope


@pytest.mark.parametrize("name, method", CASES)
def test_one_graph_with_the_results_of_eager(name, method):
    tower = TOWERS[name]
    model, x = tower.build(), tower.pictures(2)
    graphs = Graphs()
    with torch.no_grad():
        bare = tower.run(model, x)
        with vlmtok.compress(model, method):
            eager = tower.run(model, x)
            call = compiled(tower, model, graphs)
            assert_equal(call(x), eager)
            assert_equal(call(x.flip(0)), eager.flip(0), what="other pictures")
    assert_differs(eager, bare)
    assert len(graphs.found) == 1, "the second call, of the same shape, was compiled again"


@pytest.mark.parametrize("method", ["pitome:ratio=0.8", "crossget:rv=3"])
def test_through_aot(method):
    """Shapes without data and functional form: what every compiler behind Dynamo builds on."""
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    graphs = Graphs("aot_eager")
    with torch.no_grad(), vlmtok.compress(model, method):
        eager = tower.run(model, x)
        call = compiled(tower, model, graphs)
        assert_equal(call(x), eager)
        assert_equal(call(x), eager)
    assert len(graphs.found) == 1


def test_through_inductor():
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=[0;8]"):
        eager = tower.run(model, x)
        assert_equal(compiled(tower, model, "inductor")(x), eager)


def test_in_inference_mode():
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    graphs = Graphs()
    with torch.inference_mode(), vlmtok.compress(model, "pitome:ratio=0.8"):
        eager = tower.run(model, x)
        call = compiled(tower, model, graphs)
        assert_equal(call(x), eager)
        assert_equal(call(x), eager)
    assert len(graphs.found) == 1


@pytest.mark.parametrize("method", ["tome:r=4", "pitome:ratio=0.8"])
def test_the_choice_is_one_opaque_node(method):
    """What selects must not be rewritten: precision is set when it runs, and an exact order is no matter of fusion."""
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    graphs = Graphs()
    with torch.no_grad(), vlmtok.compress(model, method):
        compiled(tower, model, graphs)(x)
    op = {"tome:r=4": "vlmtok.bipartite_match", "pitome:ratio=0.8": "vlmtok.energy_match"}[method]
    assert graphs.targets().count(op) == len(model.blocks)


def test_one_more_graph_for_any_other_batch():
    """The second batch size makes Dynamo leave it open; the third needs nothing."""
    tower = TOWERS["timm ViT"]
    model = tower.build()
    graphs = Graphs()
    with torch.no_grad(), vlmtok.compress(model, "pitome:ratio=[1.0;0.6]"):
        call = compiled(tower, model, graphs)
        for batch in (2, 3, 4):
            x = tower.pictures(batch)
            assert_equal(call(x), tower.run(model, x))
    assert len(graphs.found) == 2


def test_gradients_through_a_compiled_merge():
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    with vlmtok.compress(model, "tome:r=[0;8]"):
        grads = []
        for call in (lambda pixels: tower.run(model, pixels), compiled(tower, model, "aot_eager")):
            model.zero_grad()
            call(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    for found, wanted in zip(*grads):
        assert_equal(found, wanted, within=1e-4)


def test_compile_then_compress():
    """Code compiled before is not run on: it is compiled anew, with the cut, and again without it."""
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    graphs = Graphs()
    call = compiled(tower, model, graphs)
    with torch.no_grad():
        with vlmtok.compress(model, "tome:r=4"):
            expected = tower.run(model, x)
        bare = call(x)
        with pytest.warns(VlmtokWarning, match="compiled"):
            run = vlmtok.compress(model, "tome:r=4")
        assert_equal(call(x), expected)
        assert_differs(call(x), bare)
        run.remove()
        assert_equal(call(x), bare)


@pytest.mark.parametrize("first", ["bare", "compressed"])
def test_a_twin_has_code_of_its_own(first):
    """Dynamo shares code between models of a class; neither a bare one nor one with another r may get ours."""
    tower = TOWERS["timm ViT"]
    x = tower.pictures(2)
    bare, four, six = (tower.build() for _ in range(3))
    with torch.no_grad(), vlmtok.compress(four, "tome:r=4"), vlmtok.compress(six, "tome:r=6"):
        models = {"bare": bare, "four": four, "six": six}
        expected = {name: model(x) for name, model in models.items()}
        calls = {name: torch.compile(model, backend="eager") for name, model in models.items()}
        order = list(models) if first == "bare" else list(models)[::-1]
        for name in [*order, *order]:
            assert_equal(calls[name](x), expected[name], what=name)


def test_the_torch_path_under_compile_counts_nothing():
    """`ran` tells of eager calls; a graph holds no Python."""
    tower = TOWERS["timm ViT"]
    model, x = tower.build(), tower.pictures(2)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=4"):
        kernels.ran(reset=True)
        compiled(tower, model, "eager")(x)
        assert kernels.ran() == {}
        tower.run(model, x)
        assert kernels.ran()["bipartite_match:torch"] == len(model.blocks)
