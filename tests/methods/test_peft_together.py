"""Several adapters on a model, or several layers on a weight, in installed PEFT and here. A pin
that fails says that PEFT has changed: then our sentence about it can go.
"""

import pytest
import torch

from loralab import adapt
from loralab.core.pack import Pack, SlotSpec
from loralab.errors import UserError
from loralab.methods import build
from tests.interop.models import llama, logits
from tests.methods.test_against_peft import One

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
R = 3
SLOTS = [SlotSpec(build("lora"), rank=R, seed=0), SlotSpec(build("dora"), rank=R, seed=1)]


def moved(slots):
    """Return a pack whose slots have left their starts, each the same way in any order."""
    pack = Pack(One(8, 12), slots)
    with torch.no_grad():
        for lo, bank in pack.banks():
            g = torch.Generator().manual_seed(pack.slots[lo].seed)
            for name in bank.trained:
                p = getattr(bank, name)
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return pack


def test_stacked_adapters_depend_on_their_order_in_peft():
    """DoRA's norm is the base's, but its magnitude scales what came before it, LoRA's update too.

    Merged in that order they are the same function now; in 0.20 they were another. Here adapters
    have rows of a batch each, in any order, and a second one on a model is refused.
    """
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    theirs = peft.get_peft_model(One(8, 12), peft.LoraConfig(target_modules=["layer"]), "lora")
    theirs.add_adapter("dora", peft.LoraConfig(target_modules=["layer"], use_dora=True))
    layer, found = theirs.base_model.model.layer, []
    with torch.no_grad():
        for B in layer.lora_B.values():
            B.weight.normal_(generator=torch.Generator().manual_seed(1))
        for order in (["lora", "dora"], ["dora", "lora"]):
            theirs.base_model.set_adapter(order)
            found.append(theirs(x))
            theirs.base_model.merge_adapter(order)
            torch.testing.assert_close(theirs(x), found[-1], rtol=1e-5, atol=1e-5)
            theirs.base_model.unmerge_adapter()
        assert (found[0] - found[1]).norm() > 0.1 * found[0].norm()
        lora, dora = moved(SLOTS).model(torch.cat([x, x])).chunk(2)
        again = moved(SLOTS[::-1]).model(torch.cat([x, x])).chunk(2)
    assert not torch.allclose(lora, dora)
    torch.testing.assert_close((dora, lora), again)
    with pytest.raises(UserError, match="already carries an adapter"):
        adapt(adapt(One(8, 12), "lora", rank=R).model, "dora", rank=R)


def test_a_call_that_fails_stays_with_peft():
    """What was said for its rows holds for the next ones: silently, or as an error."""
    config = peft.LoraConfig(r=R, init_lora_weights=False, target_modules=["layer"])
    theirs, x = peft.get_peft_model(One(8, 12), config).eval(), torch.ones(4, 8)
    wanted = theirs(x)
    with pytest.raises(RuntimeError, match="shapes"):
        theirs(torch.ones(4, 5), adapter_names=["__base__"] * 4)
    assert (theirs(x) - wanted).norm() > 0.1 * wanted.norm()
    torch.testing.assert_close(theirs(x), One(8, 12)(x))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        theirs(x[:2])
    pack = moved(SLOTS)
    wanted = pack.model(x)
    for state in (pack.rows([1, 3]), pack.disable()):
        with pytest.raises(RuntimeError), state:
            pack.model(torch.ones(4, 5))
        assert torch.equal(pack.model(x), wanted)
    assert torch.equal(pack.model(x[:2])[0], wanted[0])


def test_replicated_layers_merge_wrongly_in_peft():
    """Copies of a layer share one weight, to which PEFT adds every copy's update.

    Its check looks for `layer_replication` among the names of adapters.
    """
    from peft.tuners.tuners_utils import replicate_layers

    twice, targets = [(0, 2), (0, 2)], ["q_proj"]
    config = peft.LoraConfig(
        r=R, init_lora_weights=False, target_modules=targets, layer_replication=twice
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    wanted = logits(theirs)
    merged = theirs.merge_and_unload()
    assert len(merged.model.layers) == 4
    assert (logits(merged) - wanted).norm() > 1e-3 * wanted.norm()
    model = llama()
    replicate_layers(model, twice)
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    assert weights[0] is weights[2] and weights[0] is not weights[1]
    base, ours = logits(model), adapt(model, "lora", rank=R, targets=targets)
    with torch.no_grad():
        for _, bank in ours.pack.banks():
            bank.B.normal_(generator=torch.Generator().manual_seed(bank.site.rank))
    wanted = logits(ours.model)
    assert (wanted - base).norm() > 1e-3 * base.norm()
    torch.testing.assert_close(logits(ours.merge()), wanted)
    assert torch.equal(logits(ours.remove()), base)
