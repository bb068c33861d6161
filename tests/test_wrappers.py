"""Modules around and inside a model that come while it is steered: adapters, other wrappers, shards, processes."""

import os

import pytest
import torch
from tiny_models import tiny
from tiny_pipelines import PIPELINES, run
from torch import nn

import steerlib as sl
from steerlib.errors import SiteNotReached, Unanswerable, UnknownSite, UnsupportedTarget
from steerlib.hosts import REFUSED, host_for

IDS = torch.tensor([[3, 5, 7, 9], [2, 4, 6, 8]])
SITES = (
    "layers.0",
    "layers.0.in",
    "layers.0.update",
    "layers.0.attn",
    "layers.0.mlp",
    "layers.0.mlp.in",
    "layers.1.attn.heads",
)
SITES += (
    "layers.1.attn.heads.1",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj.in",
    "embed",
    "norm",
    "lm_head",
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def bank_at(model, site):
    """One direction, as wide as what is there."""
    with torch.no_grad(), sl.record(model, [site]) as tape:
        model(IDS)
    vector = torch.randn(tape[site][0][1].shape[-1], generator=torch.Generator().manual_seed(2))
    return sl.ConceptBank.from_directions({"a": vector}, site=site, base=model)


class Wrapper(nn.Module):
    """Runs what it was given, and adds something to what it gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return y + torch.linspace(0, 1, y.shape[-1])


def wrapped_by(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Wrapper(model.get_submodule(path)))

    return change


def lora(model):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
    torch.manual_seed(2)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False, r=4)).eval()


def adapter(model):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False, r=4))
    model.eval()


CHANGES = {"LoRA": lora, "add_adapter": adapter}
CHANGES |= {path: wrapped_by(path) for path in ("model.layers.0", "model.layers.0.mlp", "model.layers.1.self_attn.o_proj")}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrapper_that_comes_inside_a_session_is_steered_as_one_that_was_there(change):
    """What lies inside a wrapper is steered there, though its name leads nowhere any more; nothing stays behind."""
    for name in SITES:
        before, during = tiny("llama"), tiny("llama")
        bank, site = bank_at(before, name), host_for(before).site(name)
        CHANGES[change](before)
        if site.module.startswith(f"{change}."):
            with pytest.raises(UnknownSite), sl.steer(before, bank, {"a": 1.0}):
                pass
            inner = site.module.replace(change, f"{change}.inner") + (".in" if site.side == "input" else "")
            vectors = {"a": bank.rows(bank["a"]).write[0]}
            bank_after = sl.ConceptBank.from_directions(vectors, site=inner, base=before)
        else:
            bank_after = bank
        with torch.no_grad():
            with sl.steer(before, bank_after, {"a": sl.Set(3.0)}):
                expected = before(IDS).logits
            with sl.steer(during, bank, {"a": sl.Set(3.0)}):
                during(IDS)
                CHANGES[change](during)
                torch.testing.assert_close(during(IDS).logits, expected)
            assert not torch.equal(during(IDS).logits, expected)
        assert not any({"forward", "__reduce_ex__"} & {*vars(m)} for m in during.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in during.modules())


@pytest.mark.parametrize("ending", ["unload", "merge_and_unload"])
def test_an_adapter_that_goes_inside_a_session_leaves_what_was_there(ending):
    """Whether it came before the session or inside of it."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
    config = peft.LoraConfig(target_modules=PROJECTIONS[:-2], init_lora_weights=False, r=4)
    for name in SITES:
        models = tiny("llama"), tiny("llama")
        bank, after = bank_at(models[0], name), []
        for model, is_before in zip(models, (True, False), strict=True):
            torch.manual_seed(2)
            wrapper = peft.get_peft_model(model, config).eval() if is_before else None
            with sl.steer(model, bank, {"a": 2.0}), torch.no_grad():
                wrapper = wrapper or peft.get_peft_model(model, config).eval()
                model(IDS)
                getattr(wrapper, ending)()
                after.append(model(IDS).logits)
            with sl.steer(model, bank, {"a": 2.0}), torch.no_grad():
                torch.testing.assert_close(model(IDS).logits, after[-1])
        torch.testing.assert_close(*after)


@pytest.mark.parametrize("ending", ["attn1.to_q", "attn1.to_out.0.in", "attn2.to_k.in", "attn1"])
def test_a_lora_that_a_pipeline_gets_inside_a_session_is_steered(ending):
    """On the very projections at which concepts are moved; switched off and on it is steered, too."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False)
    site, pictures = f"unet.mid_block.attentions.0.transformer_blocks.0.{ending}", []

    def add(pipe):
        torch.manual_seed(1)
        pipe.unet.add_adapter(config)

    for is_before in (True, False):
        pipe = PIPELINES["sd1"].build()
        with sl.record(pipe, [site]) as tape:
            run(pipe)
        bank = sl.ConceptBank.from_directions({"a": torch.ones(tape[site][0][1].shape[-1])}, site=site, base=pipe)
        if is_before:
            add(pipe)
        with sl.steer(pipe, bank, {"a": sl.Set(0.5)}):
            if not is_before:
                plain = run(pipe)
                add(pipe)
            pictures.append(run(pipe))
            pipe.unet.disable_lora()
            pictures.append(run(pipe))
    torch.testing.assert_close(pictures[:2], pictures[2:])
    torch.testing.assert_close(pictures[1], plain)


def test_a_module_that_is_another_one_is_noticed():
    """Also where a child is put in place without torch's own setting of attributes."""
    model = tiny("llama")
    bank = bank_at(model, "layers.1.attn.heads")
    with pytest.raises(SiteNotReached, match="replaced"), sl.steer(model, bank, {"a": 2.0}), torch.no_grad():
        model(IDS)
        model.model.layers[1].self_attn._modules["o_proj"] = nn.Linear(32, 32)
        model(IDS)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The only one of its group."""
    where = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process")
class TestParallel:
    """Wrappers that spread a model, on one process."""

    @pytest.mark.parametrize("is_inside", [False, True])
    def test_sharded_blocks_whose_classes_have_other_names(self, is_inside):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))

        def shard(model):
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

        for name in SITES:
            plain, sharded = tiny("llama"), tiny("llama")
            bank = bank_at(plain, name)
            if not is_inside:
                shard(sharded)
            with torch.no_grad():
                with sl.steer(plain, bank, {"a": sl.Set(2.0)}):
                    expected = plain(IDS).logits
                with sl.steer(sharded, bank, {"a": sl.Set(2.0)}):
                    if is_inside:
                        shard(sharded)
                    torch.testing.assert_close(sharded(IDS).logits, expected)

    def test_copies_on_several_processes_are_steered_through_their_wrapper(self):
        """`DistributedDataParallel`, gradients included."""
        model, plain = tiny("llama"), tiny("llama")
        wrapper = nn.parallel.DistributedDataParallel(model)
        bank = bank_at(plain, "layers.0.mlp")
        assert host_for(wrapper).model is model
        for one, called in ((plain, plain), (model, wrapper)):
            with sl.steer(called, bank, {"a": sl.Set(2.0)}) as session:
                called(IDS).logits.logsumexp(-1).sum().backward()
            assert session.report().ran
            assert one is model or not any(p.grad is None for p in one.parameters())
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_wrappers_are_unwrapped_or_refused_with_the_reason():
    """Every entry of the table, by its class's name, and what inherits from it."""
    model = tiny("llama")
    with pytest.raises(UnsupportedTarget, match="DistributedDataParallel"):
        host_for(nn.DataParallel(model))
    for name, (kind, text) in REFUSED.items():
        fake = type(name.partition(".")[2], (nn.Module,), {"__module__": "torch.somewhere"})
        with pytest.raises(kind) as error:
            host_for(type("Mine", (fake,), {})())
        assert str(error.value) == text


def test_a_model_prepared_by_accelerate_is_steered(accelerate):
    model = tiny("llama")
    bank = bank_at(model, "layers.0")
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with torch.no_grad(), sl.steer(prepared, bank, {"a": sl.Set(2.0)}), sl.record(prepared, bank) as tape:
        prepared(IDS)
    torch.testing.assert_close(tape["a"][0][1], torch.full((2, 4), 2.0), rtol=1e-5, atol=1e-5)


TOGETHER = ("layers.0", "layers.0.attn", "layers.0.mlp", "layers.0.mlp.in", "embed", "norm", "lm_head")
APART = ("layers.0.attn.heads", "layers.0.attn.heads.0", "layers.0.attn.heads.1", "model.layers.0.mlp.up_proj")
APART += ("model.layers.0.mlp.down_proj.in", "model.layers.0.self_attn.q_proj")


def on_a_process(rank, folder, results):
    """Steers a model that two processes run together, and one of its own."""
    import warnings

    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    whole = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    split = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto").eval()
    found = {}
    with torch.no_grad():
        for site in (*TOGETHER, *APART):
            bank = bank_at(whole, site)
            with sl.steer(whole, bank, {"a": sl.Set(2.0)}):
                expected = whole(IDS).logits
            try:
                with sl.steer(split, bank, {"a": sl.Set(2.0)}):
                    found[site] = float((split(IDS).logits - expected).abs().max())
            except Unanswerable as error:
                found[site] = str(error)
    torch.save(found, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tensor_parallel_models_are_steered_where_a_tensor_is_whole(tmp_path):
    """Two processes; elsewhere, each head on its own process included, the site is refused on both."""
    tiny("llama").save_pretrained(tmp_path / "model")
    from torch.multiprocessing.spawn import spawn

    spawn(on_a_process, (str(tmp_path), tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(found[site] < 1e-4 for site in TOGETHER), found
        assert all("split over processes" in found[site] for site in APART), found
