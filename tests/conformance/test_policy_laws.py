"""The laws of a policy refuse broken ones, each with a message that names the mistake, and our own keep them all."""

from __future__ import annotations

import itertools
import json
import re

import attrs
import pytest
import torch
from torch.nn import functional

from rlt2i.cli import main
from rlt2i.config import load_object
from rlt2i.conformance import POLICY_LAWS, PolicyConformance, Subject, check_policy, table
from rlt2i.conformance.command import named_policy, parse_size
from rlt2i.conformance.laws import check_law
from rlt2i.interfaces import PolicySpec
from rlt2i.policies.flux import Flux, FluxPolicy
from rlt2i.policies.sana import Sana
from rlt2i.policies.tiny import save_tiny
from rlt2i.recipes.parts import PARTS
from rlt2i.rehearsal.replacing import small_policy
from tests.helpers.backbones import marked
from tests.helpers.toy import ToySpec

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("FluxPipeline", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def whole(folder):
    """A policy without fault, whose weights the broken ones share."""
    return Flux(path=str(folder), lora_rank=2, max_sequence_length=24).load()


def broken(whole, *, load=None, spec=None, **methods):
    """A subject whose policy has some methods of its own."""
    kind = attrs.frozen(kw_only=True, eq=False)(type("Broken", (FluxPolicy,), {"__annotations__": {}, **methods}))

    def load_shared(self, device="cpu"):
        return kind(spec=self, pipe=whole.pipe, text=whole.text, device=whole.device)

    fields = {"__annotations__": {}, "load": load(kind, whole) if load else load_shared, **(spec or {})}
    broken_spec = attrs.frozen(kw_only=True)(type("BrokenSpec", (Flux,), fields))
    return Subject(spec=broken_spec(path=whole.spec.path, lora_rank=2, max_sequence_length=24), asked_size=SIZE)


velocity, watched, encode, decode = (
    getattr(FluxPolicy, name) for name in ("velocity", "velocity_with_captures", "encode", "decode")
)


def on_maps(change):
    """velocity_with_captures whose maps are changed."""

    def changed(self, x, s, c, names):
        out, maps = watched(self, x, s, c, names)
        return out, {name: change(found) for name, found in maps.items()}

    return changed


def forgetful(calls=None):
    """A velocity that creeps from call to call."""
    calls = itertools.count()
    return lambda self, x, s, c: velocity(self, x, s, c) * (1 + 1e-3 * next(calls))


def summing(sums=None):
    """Maps that add up from call to call."""
    sums = {}

    def changed(self, x, s, c, names):
        out, maps = watched(self, x, s, c, names)
        for name, found in maps.items():
            sums[name] = found / 4 + (sums[name] if name in sums and sums[name].shape == found.shape else 0)
        return out, dict(sums)

    return changed


def in_place(self, x, s, c):
    out = velocity(self, x, s, c)
    x.mul_(0.5)
    return out


def checkpointed(change):
    """load: with gradient_checkpointing the velocity is changed."""

    def make(kind, whole):
        def load(self, device="cpu"):
            policy = kind(spec=self, pipe=whole.pipe, text=whole.text, device=whole.device)
            if not self.gradient_checkpointing:
                return policy
            other = attrs.frozen(kw_only=True, eq=False)(
                type("Other", (FluxPolicy,), {"__annotations__": {}, "velocity": change})
            )
            return other(spec=self, pipe=whole.pipe, text=whole.text, device=whole.device)

        return load

    return make


def draws_again(kind, whole):
    def load(self, device="cpu"):
        policy = Flux.load(self, device)
        with torch.no_grad():
            next(iter(policy.trainable_parameters().values())).normal_()
        return policy

    return load


def nudged(out):
    """Values as they were, gradients not."""
    return out + 1e-3 * (out - out.detach())


def pickled(self, folder):
    torch.save({}, folder / "weights.bin")


def later(self, text):
    return {"text": (0, [(a + 9, b + 9) for a, b in FluxPolicy.text_streams(self, text)["text"][1]])}


def beside(self, prompts):
    found = encode(self, prompts)
    mixed = found.tensors["embeddings"] - found.tensors["embeddings"].mean(0)
    return attrs.evolve(found, tensors={**found.tensors, "embeddings": mixed})


def frozen_decode(self, latents):
    with torch.no_grad():
        return decode(self, latents)


def shifted_sigmas(self, n, size):
    return torch.linspace(1, 0, n + 1)


BROKEN = {
    "missing capture": (
        {"velocity_with_captures": lambda self, x, s, c, n: (velocity(self, x, s, c), {})},
        "captures_come", "missing captures",
    ),
    "one capture of several": (
        {"velocity_with_captures": lambda self, x, s, c, n: watched(self, x, s, c, frozenset(sorted(n)[1:]))},
        "captures_come", "missing captures",
    ),
    "captures change the velocity": (
        {"velocity_with_captures": lambda self, x, s, c, n: (watched(self, x, s, c, n)[0] + 1e-4, {})},
        "watching", "when captures are recorded",
    ),
    "ungrouped rows": (
        {"encode": lambda self, p: attrs.evolve(encode(self, p), rows=torch.arange(len(p.texts)))},
        "groups_of_rows", "adjacent",
    ),
    "rows in turn": (
        {"encode": lambda self, p: attrs.evolve(encode(self, p), rows=torch.arange(3).repeat(2))},
        "groups_of_rows", "adjacent",
    ),
    "short schedule": ({"sigmas": lambda self, n, z: FluxPolicy.sigmas(self, n, z)[:-1]}, "schedule", r"T \+ 1 levels"),
    "timesteps": ({"sigmas": lambda self, n, z: 1000 * FluxPolicy.sigmas(self, n, z)}, "schedule", "thousandths"),
    "rising levels": ({"sigmas": lambda self, n, z: FluxPolicy.sigmas(self, n, z).flip(0)}, "schedule", "ends at 1"),
    "double schedule": ({"sigmas": lambda self, n, z: FluxPolicy.sigmas(self, n, z).double()}, "schedule", "float32"),
    "unshifted schedule": (
        {"sigmas": shifted_sigmas}, "same_image_as_the_pipeline", "schedule is not its pipeline's",
    ),
    "bf16 velocity": (
        {"velocity": lambda self, x, s, c: velocity(self, x, s, c).bfloat16()}, "form", r"end with \.float\(\)",
    ),
    "packed output": (
        {"velocity": lambda self, x, s, c: self.pipe._pack_latents(velocity(self, x, s, c), *x.shape)},
        "form", "packed",
    ),
    "nan": ({"velocity": lambda self, x, s, c: velocity(self, x, s, c) / (x.abs() > 1)}, "form", "NaN"),
    "wrong sign": (
        {"velocity": lambda self, x, s, c: -velocity(self, x, s, c)}, "same_image_as_the_pipeline", "wrong sign",
    ),
    "wrong time": (
        {"velocity": lambda self, x, s, c: velocity(self, x, 1 - s, c)}, "same_image_as_the_pipeline", "Compare time",
    ),
    "wrong decoder": (
        {"decode": lambda self, x: decode(self, x * 1.3)}, "same_image_as_the_pipeline", "scale and shift",
    ),
    "batch dependence": (
        {"velocity": lambda self, x, s, c: velocity(self, x, s, c) - 0.1 * velocity(self, x, s, c).mean(0)},
        "company_of_rows", "depends on its batch",
    ),
    "sigma of the first row": (
        {"velocity": lambda self, x, s, c: velocity(self, x, s[:1].expand_as(s), c)},
        "company_of_rows", "sigma or text of the first row",
    ),
    "deaf to the prompt": (
        {"velocity": lambda self, x, s, c: velocity(self, x, s, attrs.evolve(c, rows=torch.zeros_like(c.rows)))},
        "sigma_and_prompt_matter", "same for every prompt",
    ),
    "deaf to the noise level": (
        {"velocity": lambda self, x, s, c: velocity(self, x, torch.full_like(s, 0.5), c)},
        "sigma_and_prompt_matter", "same at every sigma",
    ),
    "state between calls": ({"velocity": forgetful()}, "purity", "twice, two answers"),
    "dropout": (
        {"velocity": lambda self, x, s, c: functional.dropout(velocity(self, x, s, c), 0.1)}, "purity", "dropout",
    ),
    "arguments changed": ({"velocity": in_place}, "purity", "changes its arguments"),
    "encoding in company": ({"encode": beside}, "company", "encoded alone"),
    "words moved": ({"text_streams": later}, "hard_prompts", "outside of the prompt"),
    "gradients stop": (
        {"velocity": lambda self, x, s, c: velocity(self, x, s, c).detach()}, "something_learns", "gradients stop",
    ),
    "latents detached": (
        {"velocity": lambda self, x, s, c: velocity(self, x.detach(), s, c)}, "gradient_of_latents", "gradients stop",
    ),
    "nothing trainable": ({"trainable_parameters": lambda self: {}}, "something_learns", "nothing is trainable"),
    "bf16 weights": (
        {"trainable_parameters": lambda self: {"a": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}},
        "something_learns", "float32",
    ),
    "checkpointing changes values": (
        {"load": checkpointed(lambda self, x, s, c: 1.0001 * velocity(self, x, s, c))},
        "loading_again", "velocity with gradient_checkpointing differs",
    ),
    "checkpointing changes gradients": (
        {"load": checkpointed(lambda self, x, s, c: nudged(velocity(self, x, s, c)))},
        "loading_again", "gradients with gradient_checkpointing differ",
    ),
    "another start each time": ({"load": draws_again}, "loading_again", "starts elsewhere"),
    "maps beyond one": ({"velocity_with_captures": on_maps(lambda m: 4 * m)}, "form_of_maps", "sums to one"),
    "maps over their maximum": (
        {"velocity_with_captures": on_maps(lambda m: m / m.amax((-1, -2), keepdim=True) / 20)},
        "phrases_add_up", "its own maximum",
    ),
    "maps of another grid": (
        {"velocity_with_captures": on_maps(lambda m: functional.avg_pool2d(m, 2))}, "form_of_maps", "token_grid",
    ),
    "flat maps": ({"velocity_with_captures": on_maps(lambda m: m.flatten(2))}, "form_of_maps", "token_grid"),
    "maps of others": ({"velocity_with_captures": on_maps(lambda m: m[:1].expand_as(m))}, "maps_of_rows", "rollout"),
    "phrases in an order of their own": (
        {"encode": lambda self, p: encode(self, attrs.evolve(p, core=tuple(tuple(sorted(c)) for c in p.core)))},
        "phrases_add_up", "in two orders",
    ),
    "maps kept from call to call": ({"velocity_with_captures": summing()}, "maps_repeat", "state leaks"),
    "non-square ignored": (
        {"token_grid": lambda self, z: FluxPolicy.token_grid(self, z if isinstance(z, int) else z[0])},
        "sizes", "one of the sides is ignored",
    ),
    "every size accepted": (
        {"latent_shape": lambda self, z: FluxPolicy.latent_shape(self, 32)}, "wrong_sizes", "is accepted",
    ),
    "other offers": ({"offers": frozenset({"attention/image_to_text/0"})}, "offers", "Recipes are checked"),
    "images with other strides": (
        {"decode": lambda self, x: decode(self, x).contiguous(memory_format=torch.channels_last)},
        "form_of_images", "contiguous",
    ),
    "images out of range": ({"decode": lambda self, x: 2 * decode(self, x) - 1}, "form_of_images", r"\[0, 1\]"),
    "decoder without gradient": ({"decode": frozen_decode}, "gradient_of_images", "gradients stop in decode"),
    "a pickle": ({"export": pickled}, "export", "run code"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_policy_is_refused_with_its_mistake(name, whole):
    methods, law, words = BROKEN[name]
    mistake = check_law(law, broken(whole, **methods)).mistake
    assert mistake is not None, f"{law} found nothing"
    assert re.search(words, mistake), mistake


OURS = {name: load_object(reference) for name, reference in PARTS["PolicySpec"].items()}


@pytest.mark.parametrize("name", marked(OURS))
def test_our_own_policies_keep_every_law(name, tmp_path):
    spec, size = small_policy(OURS[name](lora_rank=2), tmp_path, SIZE, compile_blocks=False, said=[])
    findings = check_policy(spec, size=size)
    assert [finding.law for finding in findings] == list(POLICY_LAWS)
    assert not any(finding.mistake for finding in findings), table(findings)


def test_a_policy_without_text_or_sizes_is_told_so():
    findings = {finding.law: finding for finding in check_policy(ToySpec(), laws=("sizes", "sigma_and_prompt_matter"))}
    assert "one of the sides is ignored" in findings["sizes"].mistake
    assert "same at every sigma" in findings["sigma_and_prompt_matter"].mistake
    assert table(list(findings.values())).endswith("2 of 2 laws are broken")


def test_a_spec_that_no_recipe_can_hold_is_refused(whole):
    class Plain(PolicySpec):
        offers = whole.offers

        def load(self, device="cpu"):
            return whole

    subject = Subject(spec=Plain(), asked_size=SIZE)
    assert "attrs.frozen" in check_law("spec_is_data", subject).mistake


def test_whatever_a_policy_raises_is_its_mistake(whole):
    def fails(self, x, s, c):
        raise RuntimeError("mat1 and mat2")

    assert check_law("form", broken(whole, velocity=fails)).mistake == "raised RuntimeError: mat1 and mat2"


def test_the_laws_are_a_class_of_tests(whole):
    class Case(PolicyConformance):
        spec = broken(whole, velocity=lambda self, x, s, c: velocity(self, x, s, c).detach()).spec
        size = SIZE

    names = {name.removeprefix("test_") for name in dir(Case) if name.startswith("test_")}
    assert names == set(POLICY_LAWS)
    Case().test_form()
    with pytest.raises(AssertionError, match="gradients stop"):
        Case().test_something_learns()


def test_a_policy_is_named_as_in_a_recipe(tmp_path):
    assert named_policy("Flux", ["lora_rank=4"]) == Flux(lora_rank=4)
    assert named_policy("rlt2i.policies.flux:Flux") == Flux()
    (tmp_path / "policy.yaml").write_text("type: Flux\nlora_rank: 4\n")
    assert named_policy(str(tmp_path / "policy.yaml"), ["lora_alpha=8"]) == Flux(lora_rank=4, lora_alpha=8)
    (tmp_path / "recipe.yaml").write_text("extends: star-shapes\nname: mine\nabout: mine\nevidence: unrun\n")
    for recipe in ("star-shapes", str(tmp_path / "recipe.yaml")):
        assert named_policy(recipe, ["lora_seed=3"]).lora_seed == 3


def test_a_pipeline_with_a_solver_of_its_own_keeps_its_schedule_and_is_not_compared(tmp_path):
    """SANA's published pipeline samples with a multistep solver; its levels are used with the Euler steps of here."""
    place = save_tiny("SanaPipeline", tmp_path)
    kind = "DPMSolverMultistepScheduler"
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    options = {"_class_name": kind, "flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(options))
    spec = Sana(path=str(place), max_sequence_length=24)
    schedule, drawn = check_policy(spec, size=SIZE, laws=("schedule", "same_image_as_the_pipeline"))
    assert schedule.mistake is None
    assert drawn.note.startswith("not compared")


def test_sizes_are_height_by_width():
    assert (parse_size("64"), parse_size("64x64"), parse_size("64x96")) == (64, 64, (64, 96))
    with pytest.raises(ValueError, match=r"--size 64X.*height x width"):
        parse_size("64X")


def test_the_command_prints_a_table_and_says_how_it_went(folder, capsys):
    arguments = ["check", "policy", "Flux", "--set", f"path={folder}", "--set", "max_sequence_length=24"]
    assert main(arguments) == 0
    assert f"all {len(POLICY_LAWS)} laws are kept" in capsys.readouterr().out
    assert main([*arguments, "--size", "33x32"]) == 2
    assert "nearest" in capsys.readouterr().err
    assert main(["check", "policy", "ToySpec"]) == 2
    assert main(["check", "policy", "tests.helpers.toy:ToySpec"]) == 1
    assert "REFUSED  sizes" in capsys.readouterr().out
