"""Ours to PEFT and back, against installed PEFT."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from loralab.core.adapter import load
from loralab.core.bank import has_gain
from loralab.core.files import read_folder
from loralab.errors import UserError
from loralab.interop.export import import_peft
from loralab.interop.peft import TYPES
from loralab.interop.peft_lora import low_rank
from loralab.methods import all_methods
from tests.interop.models import IDS, biased, gpt2, llama, logits, one_per_form, train, trained

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def by_peft(folder, make=llama):
    return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


def from_peft(config, folder, make=llama, **saving):
    """Train PEFT's adapter a little, save it, and return its logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), config)
    initial = folder / "initial"
    if saving:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = config.init_lora_weights
    train(model, model.parameters())
    wanted = logits(model.eval())
    extra = {"path_initial_model_for_weight_conversion": str(initial)} if saving else {}
    model.save_pretrained(folder / "adapter", **extra)
    return folder / "adapter", wanted


@pytest.mark.parametrize(
    ("method", "make"),
    [*((n, llama) for n in all_methods()), *((n, gpt2) for n in one_per_form())],
)
def test_peft_runs_what_it_can_express(method, make, tmp_path):
    if make is llama and method in ("randlora",):
        make = lambda: llama(kv_heads=4)  # noqa: E731  # one number of bases for all layers
    options = {"targets": ATTENTION} if make is not gpt2 else {}
    adapter = trained(method, make, **options)
    folder = adapter.save(tmp_path / "ours")
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    if kind == "LORALAB":
        form = adapter.pack.slots[0].recipe.form
        assert not low_rank(form) or form.any_rank or has_gain(form), "this is a plain LoRA file"
        with pytest.raises(UserError, match=f"PEFT has no type for {method}"):
            adapter.export(tmp_path / "peft", "peft")
        return
    theirs = logits(by_peft(folder, make))
    torch.testing.assert_close(theirs, logits(adapter.model), rtol=0, atol=1e-5)
    exported = adapter.export(tmp_path / "peft", "peft")
    assert not any("loralab" in key for key in load_file(exported / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(by_peft(exported, make)), theirs, rtol=0, atol=0)
    model = make()
    load(model, exported)
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("rslora", {}, {"r": 4, "lora_alpha": 16, "use_rslora": True}),
        ("rslora", {"rank_pattern": {"q_proj": 1}}, {"lora_alpha": 16, "alpha_pattern": {}}),
        ("pissa", {}, {"r": 8, "lora_alpha": 8, "use_rslora": False}),
        ("lora", {"alpha": 6}, {"r": 4, "lora_alpha": 6, "use_dora": False}),
        ("dora", {"init": "pissa"}, {"r": 8, "use_dora": True}),
        ("relora", {"every": 2}, {"r": 8}),
        (
            "lora",
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.5}},
            {
                "rank_pattern": {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)},
                "target_modules": [
                    "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
                ],
            },
        ),
        (
            "lora",
            {"targets": r".*\.1\..*v_proj"},
            {"target_modules": ["model.layers.1.self_attn.v_proj"]},
        ),
        ("lora", {"modules_to_train": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
        ("gralora", {"hybrid_rank": 2}, {"r": 2, "hybrid_r": 2}),
        ("adalora", {"rank_pattern": {"q_proj": 2}}, {"peft_type": "LORA"}),
        ("lora_ga", {"alpha": 3}, {"r": 8, "peft_type": "LORA"}),
        ("loha", {"rank_pattern": {"q_proj": 2}}, {"peft_type": "LOHA", "alpha": 4}),
        ("lokr", {"rank": 2}, {"peft_type": "LOKR", "decompose_factor": -1}),
        ("lokr", {"rank": 1, "factor": 2, "alpha": 3}, {"decompose_factor": 2, "alpha": 3}),
        ("hira", {"alpha": 8}, {"peft_type": "HIRA", "r": 4}),
        ("hira", {"rank_pattern": {"q_proj": 2}}, {"peft_type": "LORALAB"}),
        ("delora", {"start": "lora", "rank_pattern": {"q_proj": 2}}, {"peft_type": "DELORA"}),
        ("delora", {"start": "lora", "alpha": 6}, {"peft_type": "DELORA", "delora_lambda": 8.0}),
        ("delora", {}, {"peft_type": "LORA", "r": 8}),
        ("c3a", {}, {"peft_type": "C3A", "block_size": 8}),
        ("c3a", {"block": 4, "alpha": 2}, {"block_size": 4, "block_size_pattern": {}}),
        ("fourierft", {"n": 20}, {"peft_type": "FOURIERFT", "scaling": 300}),
        ("fourierft", {"n": 200, "loc_seed": 5}, {"n_frequency": 200, "random_loc_seed": 5}),
        ("waveft", {"n": 20}, {"peft_type": "WAVEFT", "n_frequency": 20, "use_idwt": True}),
        ("vb_lora", {"length": 4}, {"peft_type": "VBLORA", "topk": 2}),
        ("vb_lora", {"length": 4, "anchored": True}, {"peft_type": "LORA"}),
        ("glora", {}, {"peft_type": "GLORA", "config_A_B": "lora"}),
        ("glora", {"path_A": "vector", "path_B": "vector"}, {"config_A_B": "vector"}),
        ("tinylora", {"u": 5}, {"peft_type": "TINYLORA", "u": 5, "weight_tying": 0.0}),
        ("tinylora", {"tie": "model"}, {"peft_type": "TINYLORA", "weight_tying": 1.0}),
        ("tinylora", {"tie": "layer"}, {"peft_type": "LORA"}),
        ("hra", {}, {"peft_type": "HRA", "r": 4, "apply_GS": False}),
        ("oft", {}, {"peft_type": "OFT", "use_cayley_neumann": False, "oft_block_size": 4}),
        ("oft", {"neumann": 4, "share": True}, {"num_cayley_neumann_terms": 6}),
        ("boft", {"n_factors": 1}, {"peft_type": "BOFT", "boft_block_size": 4}),
        ("boft", {"n_factors": 1, "rescale": True}, {"peft_type": "BOFT"}),
        ("ia3", {}, {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}),
        ("road", {}, {"peft_type": "ROAD", "variant": "road_1", "group_size": 2}),
        ("road", {"variant": 4, "group": 4}, {"peft_type": "ROAD", "variant": "road_4"}),
        ("miss", {}, {"peft_type": "MISS", "r": 4}),
        ("miss", {"shards": "outputs"}, {"peft_type": "LORA"}),
        ("shira", {}, {"peft_type": "SHIRA", "r": 4}),
        ("vera", {}, {"peft_type": "VERA", "r": 4, "save_projection": True}),
    ],
)  # fmt: skip
def test_the_configuration_is_peft_s(method, options, expected, tmp_path):
    adapter = trained(method, **options)
    folder = adapter.save(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {k: config[k] for k in expected} == expected
    assert config["task_type"] == "CAUSAL_LM"
    wanted, model = logits(adapter.model), llama()
    if config["peft_type"] != "LORALAB":
        torch.testing.assert_close(logits(by_peft(folder)), wanted, rtol=0, atol=1e-5)
        load(llama(), adapter.export(tmp_path / "peft", "peft"))
    assert (wanted - logits(llama())).abs().max() > 1e-4, "nothing was learned, nothing compared"
    again = load(model, folder)
    assert torch.equal(logits(model), wanted) and again.pack.slots == adapter.pack.slots


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ia3", {}),
        ("road", {"variant": 2}),
        ("glora", {}),
        ("glora", {f"path_{name}": "vector" for name in "ABCDE"}),
        ("glora", {f"path_{name}": "none" for name in "CDE"}),
    ],
)
def test_the_bias_is_peft_s_too(method, options, tmp_path):
    adapter = trained(method, biased, **options)
    wanted = logits(adapter.model)
    folder = adapter.export(tmp_path / "peft", "peft")
    torch.testing.assert_close(logits(by_peft(folder, biased)), wanted, rtol=0, atol=1e-5)
    model = biased()
    load(model, folder)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    base = [m.bias.clone() for m in model.modules() if getattr(m, "bias", None) is not None]
    torch.testing.assert_close(logits(adapter.merge()), wanted, rtol=0, atol=1e-5)
    adapter.unmerge()
    model = adapter.remove()
    back = [m.bias for m in model.modules() if getattr(m, "bias", None) is not None]
    assert all(torch.equal(a, b) for a, b in zip(back, base, strict=True))
    with pytest.raises(UserError, match="no LoRA form on layers with a bias"):
        trained(method, biased, **options).export(tmp_path / "lora", "lora")


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=ATTENTION),
    "rslora, patterns": lambda: peft.LoraConfig(
        r=4, use_rslora=True, target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 3},
        alpha_pattern={"^model.layers.0.mlp.up_proj": 5, "down_proj": 3},
    ),
    "dora, regex": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=r".*\.1\..*proj"),
    "rank above the layer": lambda: peft.LoraConfig(r=12, target_modules=["k_proj"]),
    "one layer": lambda: peft.LoraConfig(target_modules=["up_proj"], layers_to_transform=[1]),
    "head": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=ATTENTION),
    "dora, pissa": lambda: peft.LoraConfig(
        r=4, init_lora_weights="pissa", use_dora=True, target_modules=ATTENTION
    ),
    "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", target_modules=ATTENTION),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=ATTENTION, rank_pattern={"q_proj": 3}
    ),
    "vera": lambda: peft.VeraConfig(r=12, target_modules=["k_proj", "up_proj"]),
    "gralora": lambda: peft.GraloraConfig(r=4, hybrid_r=3, gralora_k=2, target_modules=ATTENTION),
    "randlora": lambda: peft.RandLoraConfig(r=3, target_modules=["q_proj", "up_proj", "down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=5, target_r=2, total_step=9, lora_alpha=4, target_modules=ATTENTION
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=ATTENTION),
    "lokr, factor": lambda: peft.LoKrConfig(r=1, decompose_factor=2, target_modules=ATTENTION),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=ATTENTION),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=ATTENTION),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=ATTENTION),
    "c3a, blocks": lambda: peft.C3AConfig(
        block_size=16, block_size_pattern={"k_proj": 8, "v_proj": 8}, target_modules=ATTENTION
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=ATTENTION),
    "waveft": lambda: peft.WaveFTConfig(
        n_frequency=50, random_loc_seed=3, target_modules=ATTENTION
    ),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=9, vector_length=4, target_modules=ATTENTION
    ),
    "glora": lambda: peft.GloraConfig(r=4, target_modules=ATTENTION),
    "glora, constant": lambda: peft.GloraConfig(config_A_B="constant", target_modules=ATTENTION),
    "tinylora": lambda: peft.TinyLoraConfig(r=4, u=5, target_modules=ATTENTION),
    "tinylora, tied": lambda: peft.TinyLoraConfig(
        r=4, u=5, weight_tying=1.0, target_modules=ATTENTION
    ),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=ATTENTION),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ATTENTION),
    "oft, exact": lambda: peft.OFTConfig(
        oft_block_size=8, use_cayley_neumann=False, target_modules=ATTENTION
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "road": lambda: peft.RoadConfig(group_size=4, target_modules=ATTENTION),
    "road 4": lambda: peft.RoadConfig(variant="road_4", group_size=4, target_modules=ATTENTION),
    "miss": lambda: peft.MissConfig(r=3, target_modules=ATTENTION),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=ATTENTION),
    "embedding": lambda: peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]),
    "embedding, dora": lambda: peft.LoraConfig(
        r=3, use_dora=True, target_modules=["embed_tokens", "q_proj"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CONFIGS))
def test_we_run_what_peft_trained(case, tmp_path):
    folder, wanted = from_peft(CONFIGS[case](), tmp_path)
    model = llama()
    base = logits(model)
    adapter = load(model, folder)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert (wanted - base).abs().max() > 3e-4, "nothing was learned, so nothing was compared"
    again = llama()
    load(again, adapter.save(tmp_path / "ours"))
    assert torch.equal(logits(again), logits(model))
    theirs = logits(by_peft(tmp_path / "ours"))
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-5)
    train(model, adapter.parameters(), steps=1)
    assert not torch.equal(logits(model), logits(again))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {"r": 4}),
        ("LoraConfig", {"r": 4, "use_dora": True}),
        ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
        ("VeraConfig", {"r": 4}),
        ("RandLoraConfig", {"r": 4}),
        ("GraloraConfig", {"r": 4}),
        ("AdaLoraConfig", {"init_r": 5, "target_r": 3, "total_step": 9}),
    ],
)
def test_conv1d_from_peft(kind, options, tmp_path):
    config = getattr(peft, kind)(target_modules=["c_attn", "c_fc"], **options)
    folder, wanted = from_peft(config, tmp_path, gpt2)
    model = gpt2()
    load(model, folder)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_pissa_that_peft_converted(tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=ATTENTION)
    folder, wanted = from_peft(config, tmp_path, convert=True)
    model = llama()
    load(model, folder)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_adalora_after_peft_pruned_it(tmp_path):
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, target_modules=ATTENTION)
    theirs = peft.get_peft_model(llama(), config)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-2)
    for step in range(7):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    counts = {
        len(t) for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "_E" in n
    }
    assert len(counts) > 1, "PEFT pruned nothing, or every layer alike"
    model = llama()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=0, atol=1e-5)


def test_sequence_classification_heads_go_both_ways(tmp_path):
    from transformers import LlamaForSequenceClassification

    def make():
        torch.manual_seed(0)
        config = llama().config
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    adapter = trained("lora", make, steps=0, modules_to_train=["score"])
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder = adapter.save(tmp_path)
    assert read_folder(folder).config["task_type"] == "SEQ_CLS"
    model = make()
    load(model, folder)
    assert torch.equal(logits(model), logits(adapter.model))
    theirs = logits(by_peft(folder, make))
    torch.testing.assert_close(theirs, logits(model), rtol=0, atol=1e-5)


def test_olora_on_conv1d_is_refused_because_peft_starts_from_the_transpose(tmp_path):
    config = peft.LoraConfig(
        init_lora_weights="olora", target_modules=[r"attn.c_proj"], fan_in_fan_out=True
    )
    folder, _ = from_peft(config, tmp_path, gpt2)
    with pytest.raises(UserError, match="starts from the transposed weight"):
        load(gpt2(), folder)


def test_unknown_keys_are_kept(tmp_path):
    folder, _ = from_peft(CONFIGS["lora"](), tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_tomorrow": {"a": 1}}))
    first = load(llama(), folder).save(tmp_path / "a")
    second = load(llama(), first).save(tmp_path / "b")
    for path in (first, second, import_peft(folder, tmp_path / "c").path):
        assert read_folder(path).config["of_tomorrow"] == {"a": 1}
    assert read_folder(second).config == read_folder(first).config


@pytest.mark.parametrize("case", ["rslora, patterns", "dora, regex", "loha", "vera", "adalora"])
def test_import_needs_no_base(case, tmp_path):
    folder, wanted = from_peft(CONFIGS[case](), tmp_path)
    done = import_peft(folder, tmp_path / "ours")
    out, model = done.path, llama()
    adapter = load(model, out)
    assert (adapter.method, adapter.pack.count_parameters()) == (done.method, [done.n_params])
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(by_peft(out)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, "bias='all'.*train it with bias='none'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"peft_type": "LORRA"}, "type LORRA cannot be loaded; did you mean LORA"),
        ({"r": 16}, r"says rank 16 for layer 'model.layers.0.*' and its tensors have rank 4"),
        ({"rank_pattern": {"o_proj": 3}}, r"says rank 3 for layer '.*o_proj' and its tensors"),
        ({"peft_type": "VERA"}, "holds no tensor of a VERA adapter"),
        ({"peft_type": "LORALAB"}, "lost their loralab record"),
        ({"use_dora": True}, "no lora_magnitude_vector for layer 'model.layers.0.self_"),
        ({"lora_alpha": "big"}, "adapter_config.json .* cannot be understood: .*'big'"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(change, words, tmp_path):
    folder, _ = from_peft(CONFIGS["lora"](), tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = llama()
    before = logits(model)
    with pytest.raises(UserError, match=words) as caught:
        load(model, folder)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


def test_every_type_goes_both_ways():
    """The two tables above have a case for each type that we know."""
    rows = test_the_configuration_is_peft_s.pytestmark[0].args[1]
    ours = {row[2].get("peft_type") for row in rows} | {"GRALORA", "ADALORA", "RANDLORA"}
    theirs = {make().peft_type.value for make in CONFIGS.values()}
    assert set(TYPES) <= ours and set(TYPES) <= theirs


def test_vera_without_projections_is_refused(tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False)
    folder, _ = from_peft(config, tmp_path / "b")
    with pytest.raises(UserError, match="save_projection=True"):
        load(llama(), folder)


def test_a_changed_embedding_in_the_file_is_refused(tmp_path):
    folder, _ = from_peft(CONFIGS["embedding"](), tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    rewrite(folder, lambda t: t | {key: t[key] + 1})
    with pytest.raises(UserError, match=r"brings a model\.embed_tokens\.weight of its own"):
        load(llama(), folder)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_layers_that_do_not_fit_are_named(tmp_path):
    folder, _ = from_peft(CONFIGS["lora"](), tmp_path)
    with pytest.raises(UserError, match=r"layer 'model\.layers\.0\.self_attn\.\w+' is not in"):
        load(gpt2(), folder)
    with pytest.raises(UserError, match=r"k_proj' is 16 x 16 in the model and 8 x 16 in the"):
        load(llama(kv_heads=4), folder)
    rewrite(folder, lambda t: {re.sub("q_proj", "q_prj", n): v for n, v in t.items()})
    with pytest.raises(UserError, match=r"q_prj' is not in the model; did you mean .*q_proj\?"):
        load(llama(), folder)
    rewrite(folder, lambda t: {n.removeprefix("base_model.model."): v for n, v in t.items()})
    with pytest.raises(UserError, match=r"its keys begin with base_model\.model\."):
        load(llama(), folder)
