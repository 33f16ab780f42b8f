"""The suites that ship, suites of one's own, and `rlt2i eval --suite`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i import cli
from rlt2i.config import ConfigError
from rlt2i.evaluation.suites import list_suites, load_suite, suite
from rlt2i.evaluation.suites.evaluate import evaluate_suite, named_rewards
from rlt2i.evaluation.suites.results import describe, judged
from rlt2i.recipes import load_recipe
from rlt2i.rewards.geneval_rules import TAGS
from rlt2i.tasks import published
from rlt2i.tasks.base import check_metadata
from rlt2i.tasks.prompt_sets import PROMPT_SETS, PromptSet
from rlt2i.tasks.published import PublishedPrompts
from tests.recipes.test_recipes import TOY

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", list_suites())
def test_shipped_suites_are_what_their_names_say(name: str):
    found = load_suite(name)
    assert found.name == name
    assert 0 < len(found.about) <= 100
    assert (name, found.prompts, found.images_per_prompt) in {
        ("drawbench", 200, 5),
        ("geneval", 553, 4),
        ("geneval2", 800, 1),
        ("ocr", 1018, 1),
        ("ocr-offline", 400, 2),
        ("partiprompts", 1632, 1),
        ("pickscore", 2048, 1),
        ("pickscore-sfw", 1024, 1),
        ("shapes", 144, 8),
    }
    for reward in found.rewards.values():
        check_metadata(found.task, reward)


@pytest.mark.parametrize(("name", "count"), [("geneval", 553), ("ocr-offline", 400), ("shapes", 46)])
def test_suites_whose_prompts_need_no_network(name: str, count: int):
    prompts = load_suite(name).chosen_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == count


def test_the_docs_name_every_suite():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert not [name for name in list_suites() if f"`{name}`" not in page]


def test_geneval_is_the_mean_of_the_tags_and_the_share_of_prompts_with_any_image_right():
    found = load_suite("geneval")
    # One prompt per tag with 2 images, but four of the last tag; first images right, the last three prompts all wrong.
    rows = []
    for number in range(9):
        for index in range(2):
            right = float(index == 0 and number < 6)
            said = {"score": right, "components": {"official": right, "strict": 0.0}}
            tag = TAGS[min(number, 5)]
            rows.append({"prompt": f"p{number}", "category": tag, "scores": {"geneval": said}})
    measures = judged(rows, "geneval", overall=found.overall).measures
    assert measures["official"].mean.mean == pytest.approx((5 * 1 / 2 + 1 / 8) / 6)  # not 6 / 18
    assert measures["official"].any_of.mean == pytest.approx(6 / 9)
    assert measures["strict"].mean.mean == 0
    assert measures["official"].categories[TAGS[5]].mean == pytest.approx(1 / 8)


def test_a_suite_of_ones_own(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("".join(f"a thing {i}\n" for i in range(20)))
    path = tmp_path / "mine.yaml"
    text = f"""
name: mine
task: {{type: PromptFileTask, train: {tmp_path}/prompts.txt}}
prompts: 2
images_per_prompt: 4
rewards: {{size: JPEGCompressibility}}
headline: size
"""
    path.write_text(text)
    assert [p.text for p in load_suite(path).chosen_prompts()] == ["a thing 9", "a thing 19"]
    path.write_text(text.replace("headline: size", "headline: sise"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*no reward of the suite is called 'sise'"):
        load_suite(path)
    with pytest.raises(ConfigError, match="unknown suite 'genevl'; did you mean 'geneval'"):
        load_suite("genevl")


def test_published_sets_are_fetched_and_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = "Prompt\tCategory\ncow\tAnimals\ndog\tAnimals\nhill\tOutdoor Scenes\n"
    (tmp_path / "parti.tsv").write_text(content)
    monkeypatch.setenv("RLT2I_PROMPTS", str(tmp_path / "home"))
    entry = PromptSet(
        url=(tmp_path / "parti.tsv").as_uri(),
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        count=3,
        licence="ours",
    )
    monkeypatch.setattr(published, "PROMPT_SETS", {"partiprompts": entry})
    published._read.cache_clear()
    task = PublishedPrompts(set="partiprompts")
    assert [p.text for p in task.eval_prompts(3)] == ["cow", "dog", "hill"]
    assert [p.category for p in task.eval_prompts(2)] == ["Animals", "Outdoor Scenes"]
    with pytest.raises(ValueError, match="a benchmark; training on it would void it"):
        task.train_prompts(seed=0, start=0, count=1)
    with pytest.raises(ValueError, match="set"):
        PublishedPrompts(set="pickscore_train")
    published._read.cache_clear()
    assert set(published.EVALUATION_SETS) <= set(PROMPT_SETS)


def test_geneval2_brings_its_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"prompt": "two cows", "atom_count": 3, "vqa_list": [["How many cows?", "two"]], "skills": ["count"]},
        {"prompt": "a pig", "atom_count": 4, "vqa_list": [["Are there any pigs?", "Yes"]], "skills": ["object"]},
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(content)
    monkeypatch.setenv("RLT2I_PROMPTS", str(tmp_path / "home"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    entry = PromptSet(url=(tmp_path / "a.jsonl").as_uri(), sha256=digest, count=2, licence="ours")
    monkeypatch.setattr(published, "PROMPT_SETS", {"geneval2": entry})
    published._read.cache_clear()
    suite = attrs.evolve(load_suite("geneval2"), prompts=2)
    assert [(p.text, p.category) for p in suite.chosen_prompts()] == [("two cows", "3 atoms"), ("a pig", "4 atoms")]
    assert suite.chosen_prompts()[0].metadata == rows[0]
    check_metadata(suite.task, *suite.rewards.values())
    published._read.cache_clear()


def test_features_of_a_transformer_in_a_folder(tmp_path: Path):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    sizes = {"img_size": 224, "patch_size": 56, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_for_hf(network, str(tmp_path), model_args=sizes, safe_serialization=True)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = describe(images, str(tmp_path))
    assert features.shape == (3, 16)
    torch.testing.assert_close(describe(images[1:2], str(tmp_path)), features[1:2], atol=1e-5, rtol=1e-5)
    assert describe(images, suite.PIXELS).shape == (3, 768)


def test_the_embedded_suite_runs_offline_and_twice_alike(tmp_path: Path):
    recipe = load_recipe("star-shapes", ["train.rollout_batch_size=6"])
    options = {"prompts": 6, "say": lambda _: None}

    small = attrs.evolve(load_suite("shapes"), images_per_prompt=2, steps=4)
    first = evaluate_suite(recipe, small, out=tmp_path / "a", **options)
    again = evaluate_suite(recipe, small, out=tmp_path / "b", against=tmp_path / "a", **options)
    assert first.headline_measure.mean.values == 12
    assert again.headline_measure.gain.mean == 0
    assert set(first.headline_measure.categories) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert "fewer than 10 prompts" in first.text()


# ----------------------------------------------------------------------------------------------------- command line

MINE = """
name: mine
task: {type: "tests.helpers.suite_parts:Corners"}
prompts: 10
images_per_prompt: 2
rewards: {corner: {type: "tests.helpers.suite_parts:Brightness"}}
headline: corner
steps: 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a toy recipe and a suite in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path


def test_eval_by_a_suite(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["eval", "toy.yaml", "--suite", "mine.yaml", "--prompts", "4", "--out", "base"]) == 0
    shown = capsys.readouterr().out
    assert "mine (version 1): toy, base weights" in shown
    assert "4 prompts x 2 images; mean over images" in shown
    assert cli.main(["eval", "base", "--reward", "size=JPEGCompressibility", "--features", "pixels"]) == 0
    assert list(json.loads(Path("base/report.json").read_text())["rewards"]) == ["corner", "size"]
    assert cli.main(["eval", "base", "--rescore", "corner"]) == 0
    shards = ["eval", "toy.yaml", "--suite", "mine.yaml", "--prompts", "4", "--out", "two"]
    assert cli.main([*shards, "--shard", "0/2"]) == 0
    assert "4 of 8 images are missing" in capsys.readouterr().out
    assert cli.main([*shards, "--shard", "1/2", "--against", "base"]) == 0
    assert "gain +0 [+0, +0]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy.yaml", "--suite", "min.yaml"], "unknown suite 'min.yaml'"),
        (["toy.yaml", "--suite", "mine.yaml", "--shard", "2/2"], "shard 2/2"),
        (["toy.yaml", "--suite", "mine.yaml", "--score-only"], "no fingerprint.json"),
        (["toy.yaml", "--suite", "mine.yaml", "--reward", "JPEG"], "unknown Reward 'JPEG'"),
        (["toy.yaml", "--shard", "0/2"], "--shard goes with --suite NAME"),
        (["toy.yaml", "--reward", "PickScore"], "--reward goes with --suite NAME"),
    ],
)
def test_eval_refuses(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert cli.main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_rewards_as_users_name_them(tmp_path: Path):
    (tmp_path / "small.yaml").write_text("type: JPEGCompressibility\nquality: 50\n")
    found = named_rewards(
        [
            "JPEGCompressibility",
            "tests.helpers.toy:QuadrantBrightness",
            str(tmp_path / "small.yaml"),
            "x=JPEGCompressibility",
        ]
    )
    assert list(found) == ["jpegcompressibility", "quadrantbrightness", "small", "x"]
    assert found["small"].quality == 50
    with pytest.raises(ValueError, match="'x' is there twice"):
        named_rewards(["x=JPEGCompressibility", "x=JPEGIncompressibility"])
