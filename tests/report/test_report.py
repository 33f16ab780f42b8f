"""`write_report`: well formed, self-contained, honest about its numbers, and never in the way."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlt2i.inputs.display import visible
from rlt2i.report import write_report
from rlt2i.report.atlas import marked
from rlt2i.report.rundir import EvalImages, has_pass_mark, open_images, open_maps, read_run
from rlt2i.report.sections import training
from rlt2i.report.summary import headline, outcomes, paired_gain, parts

SECTIONS = (
    "curve", "categories", "images", "maps", "training", "timing", "use", "recipe", "versions", "reproduce"
)  # fmt: skip
VOID = {"img", "meta", "br", "hr"}


class Checker(HTMLParser):
    """Collects what a page refers to, and insists that tags nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.styles = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                self.references.append(value)
            if key == "style":
                self.styles += value
            assert not key.startswith("on"), f"inline handler {key}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data


def check(path: Path) -> tuple[str, Checker]:
    """The page's text, after it has been found well formed and self-contained."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    assert "url(" not in checker.styles
    assert "@import" not in checker.styles
    for reference in checker.references:
        assert reference.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), reference[:80]
        if reference.startswith("#"):
            assert reference[1:] in checker.ids
    return text, checker


def rewrite(path: Path, **changes: object) -> None:
    """Change the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["info"])
    save_file(load_file(path), path, metadata={"info": json.dumps({**info, **changes})})


# ------------------------------------------------------------------------------------------------------- the page


def test_a_whole_run(make_run):
    run = make_run()
    path = write_report(run)
    assert path == run / "report.html"
    text, checker = check(path)
    assert set(SECTIONS) <= set(checker.ids)
    assert (
        "Held-out strict accuracy 0.47 → 0.66 over 27 iterations, paired gain +0.19 [0.15,\u00a00.23], 480 images, "
        "mean objects 1.74 vs 1.75 asked." in text
    )
    assert "interval lies above zero" in text
    assert checker.tags.count("img") > 50
    assert text.count("<svg") > 8
    assert "clip_range: 1.0e-2" in text  # the recipe
    assert "9f2c41d07b" in text  # its hash
    assert re.findall(r'class="missing">([^<]*)', text) == ["This run has no checkpoint with an export. "]
    assert list(run.glob(".report*")) == []  # nothing staged is left behind


def test_the_report_can_go_elsewhere_and_does_not_say_where_it_was_made(make_run, tmp_path):
    out = write_report(make_run(), tmp_path / "deep" / "page.html")
    assert out == tmp_path / "deep" / "page.html"
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_it_is_the_same_page_every_time(make_run):
    run = make_run()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_prompts_are_text(make_run):
    run = make_run()
    text, checker = check(write_report(run))
    assert "a &lt;b&gt;red&lt;/b&gt; &#34;square&#34; &amp; &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "b" not in checker.tags


@pytest.mark.parametrize("left_out", ["recipe", "metrics", "images", "maps"])
def test_what_is_missing_is_named(make_run, left_out):
    text, checker = check(write_report(make_run(**{left_out: False})))
    assert set(SECTIONS) <= set(checker.ids)
    wanted = {
        "recipe": ("recipe.yaml", "rlt2i train"),
        "metrics": ("metrics.jsonl", "rlt2i train"),
        "images": ("images/eval-&lt;step&gt;.safetensors", "rlt2i eval star-shapes-demo"),
        "maps": ("maps/step-&lt;step&gt;.safetensors", "rlt2i maps star-shapes-demo"),
    }[left_out]
    assert all(word in text for word in wanted)
    assert "missing" in re.findall(r'class="(\w+)"', text)


def test_an_empty_directory_still_gives_a_page(tmp_path):
    text, _ = check(write_report(tmp_path))
    assert "No result yet." in text


def test_not_a_directory(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        write_report(tmp_path / "nowhere")


def test_damaged_files_are_reported_not_raised(make_run):
    run = make_run()
    (run / "recipe.yaml").write_text("a: [1,\n b: }", encoding="utf-8")
    (run / "versions.json").write_text("[1]", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 28, "phase": "tra')
    for path in [*run.glob("images/*"), *run.glob("maps/*")]:
        path.write_bytes(path.read_bytes()[:1000])
    text, _ = check(write_report(run))
    assert "recipe.yaml cannot be parsed" in text
    assert "versions.json holds a list" in text
    assert "1 line could not be read" in text
    assert "eval-000000.safetensors cannot be read" in text
    assert "step-000027.safetensors cannot be read" in text
    assert "0.47 → 0.66" in text  # what can be read is still shown


def test_one_damaged_file_among_good_ones_is_a_warning(make_run):
    run = make_run()
    (run / "images" / "eval-000009.safetensors").write_bytes(b"")
    text, checker = check(write_report(run))
    assert "eval-000009.safetensors cannot be read" in text
    assert checker.tags.count("img") > 50


def test_files_of_the_wrong_shape_are_reported(make_run):
    run = make_run()
    for path in run.glob("images/*"):
        save_file({"images": torch.zeros(2, 3, 4, 4)}, path)
    for path in run.glob("maps/*"):
        save_file({"weights": torch.ones(1, 2, 2)}, path)
    text, _ = check(write_report(run))
    assert "images are F32" in text
    assert "no tensor final and no sigmas" in text


def test_lists_that_are_too_short_are_filled(make_run):
    run = make_run()
    for path in [*run.glob("images/*"), *run.glob("maps/*")]:
        rewrite(path, prompts=["only one"], scores=[None], categories=None, core=None)
    text, _ = check(write_report(run))
    assert "(prompt not recorded)" in text


def test_preference_scores_have_no_pass_mark(make_run):
    text, _ = check(write_report(make_run(preference=True, side=120)))
    assert "mean change" in text
    assert "Largest rises" in text
    assert "fixed: failed before" not in text
    assert "data:image/jpeg" in text  # photographs are not stored as PNG


def test_maps_without_steps_or_clean_predictions(make_run):
    run = make_run(maps=False)
    (run / "maps").mkdir()
    tensors = {
        "weights": torch.ones(2, 1, 1, 1),
        "final": torch.zeros(2, 3, 24, 24, dtype=torch.uint8),
        "sigmas": torch.linspace(1, 0, 4),
    }
    info = json.dumps({"prompts": ["<em>x</em>", "b"], "scores": [1.0, 0.0], "core": [["x"], []]})
    save_file(tensors, run / "maps" / "step-000009.safetensors", metadata={"info": info})
    text, checker = check(write_report(run))
    assert "em" not in checker.tags
    assert "no core phrase was recorded" in text


def test_many_steps_are_thinned_and_uneven_means_are_shown(make_run):
    run = make_run()
    for path in run.glob("maps/*"):
        tensors = load_file(path)
        tensors["weights"] = tensors["weights"].repeat(1, 3, 1, 1) * torch.linspace(0.5, 1.5, 30).view(1, -1, 1, 1)
        tensors["clean"] = tensors["clean"].repeat(1, 3, 1, 1, 1)
        tensors["sigmas"] = torch.linspace(1, 0, 31)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)
    text, _ = check(write_report(run))
    assert "10 of 30 steps shown." in text
    assert "mean 0.50" in text


# ---------------------------------------------------------------------------------------------------- the numbers


def evaluation(scores, prompts=None, step=0):
    prompts = prompts or [f"p{i}" for i in range(len(scores))]
    return EvalImages(path=Path("x"), step=step, prompts=prompts, scores=scores, categories=["all"] * len(scores))


def test_outcomes_by_hand():
    before, after = evaluation([0, 0, 1, 1, math.nan]), evaluation([0, 1, 0, 1, 1.0])
    counts = outcomes(before, after)
    assert (counts.fixed_indices, counts.broken_indices) == ([1], [2])
    assert (counts.right_indices, counts.wrong_indices) == ([3], [0])
    assert counts.total == 4  # an invalid score is no verdict


def test_gain_from_saved_images_by_hand():
    # 100 pairs, 30 fixed, 10 broken: mean .2, variance (.4 - .04) * 100/99, SE .0603.
    before = evaluation([0.0] * 30 + [1.0] * 10 + [1.0] * 20 + [0.0] * 40)
    after = evaluation([1.0] * 30 + [0.0] * 10 + [1.0] * 20 + [0.0] * 40)
    gain = paired_gain("strict", {"step": 9.0}, 0.3, 0.5, (before, after))
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == pytest.approx((0.2 - 1.96 * 0.0603, 0.2 + 1.96 * 0.0603), abs=1e-4)
    assert "100 saved pairs" in gain.source
    # Images that do not reproduce the logged difference are not those that were scored.
    assert math.isnan(paired_gain("strict", {"step": 9.0}, 0.3, 0.7, (before, after)).low)


@pytest.mark.parametrize(
    ("rise", "words"), [(0.19, "above zero"), (-0.1, "below zero"), (0.01, "not distinguishable from no change")]
)
def test_the_verdict_follows_the_interval(make_run, rise, words):
    assert words in headline(read_run(make_run(rise=rise, images=False, maps=False)), None).verdict


def write_rows(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_reward_hacking_is_pointed_out(tmp_path):
    rows = [
        {"step": s, "phase": "eval", "eval/strict": 0.4 + s / 100, "eval/objects": o, "eval/objects_asked": 1.75}
        for s, o in ((0, 1.7), (30, 3.66))
    ]
    write_rows(tmp_path, rows)
    assert "reward hacking" in " ".join(headline(read_run(tmp_path), None).warnings)
    text, _ = check(write_report(tmp_path))
    assert "3.66 objects on average" in text


def test_runs_without_strict_or_without_evaluations(tmp_path):
    write_rows(tmp_path, [{"step": s, "phase": "eval", "eval/reward": 21 + s / 10} for s in (5, 10)])
    head = headline(read_run(tmp_path), None)
    assert head.sentence == "Held-out reward 21.5 → 22 over 5 iterations, gain +0.50."
    assert "chance cannot be ruled out" in head.verdict
    assert "not of the base model" in head.warnings[0]
    write_rows(tmp_path, [{"step": s, "phase": "train", "reward/mean": s / 10} for s in range(1, 11)])
    head = headline(read_run(tmp_path), None)
    assert head.sentence == "Training reward 0.1 → 1 over 10 iterations."
    write_rows(tmp_path, [{"step": 0, "phase": "eval", "eval/strict": 0.47}])
    assert "one evaluation only" in headline(read_run(tmp_path), None).verdict
    check(write_report(tmp_path))


def test_a_resumed_run_counts_each_update_once(tmp_path):
    rows = [{"step": s, "phase": "train", "reward/mean": v} for s, v in ((1, 0.1), (2, 0.2), (3, 0.9), (3, 0.3))]
    write_rows(tmp_path, rows)
    assert [row["reward/mean"] for row in read_run(tmp_path).train] == [0.1, 0.2, 0.3]


def test_not_a_number_in_the_metrics(make_run):
    run = make_run()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 28, "phase": "train", "reward/mean": NaN, "grad_norm": Infinity, "seconds/update": NaN}\n')
        file.write('{"step": 28, "phase": "eval", "eval/strict": NaN}\n')
    text, _ = check(write_report(run))
    assert "0.47 → 0.66" in text


def test_a_metric_is_a_panel_and_a_constant_is_text(tmp_path):
    rows = [
        {
            "step": s, "phase": "train", "reward/mean": 0.5, "grad_norm": float(s), "clip/low": 0.0, "clip/low@0": 0.0,
            "kl/old_v": 0.1 * s, "ratio": 1.0 + 1e-9 * s, "gain": s, "gain_low": s - 1.0, "gain_high": s + 1.0,
            "informative": 1.0, "informative@0": s / 10, "eval/strict": 0.1 * s, "health/edges": 0.1 * s,
        }
        for s in (1, 2, 3)
    ]  # fmt: skip
    write_rows(tmp_path, rows)
    run = read_run(tmp_path)
    found = training(run, headline(run, None))
    titles = [re.search(r'aria-label="([^.]*)\.', svg)[1] for svg in found["panels"]]
    assert titles == [
        "Gradient norm", "Distance from the old policy&#x27;s velocity", "Share of rollouts with an advantage", "Gain"
    ]  # fmt: skip
    assert found["constants"] == [("clip/low", "0"), ("ratio", "1")]
    assert "fill-opacity" in found["panels"][-1]  # the bounds are its band
    assert found["more"] == []


def test_the_time_of_an_evaluation_is_no_time_of_training(tmp_path):
    train = [{"step": s, "phase": "train", "seconds/rollout": 7.0, "seconds/update": 3.0} for s in (1, 2)]
    train[1] |= {"seconds/eval": 100.0, "eval/strict": 0.5}  # an iteration that ended with an evaluation repeats it
    write_rows(tmp_path, [*train, {"step": 2, "phase": "eval", "eval/strict": 0.5, "seconds/eval": 100.0}])
    text, _ = check(write_report(tmp_path))
    assert "20 s in 2 iterations, 10 s each. 1 evaluation took another 1 min 40 s." in text
    assert re.search(r'<div class="value">20 s</div><div class="label">training time, without evaluations', text)


def test_a_failed_image_says_what_the_verifier_saw(make_run):
    run = make_run()
    for path in run.glob("images/*"):
        when = "first" if "000000" in path.name else "last"
        rewrite(path, notes=[f"seen: {when} <b>{i}</b>" for i in range(48)])
    text, _ = check(write_report(run))
    pairs = re.findall(r'<figure class="pair (\w+)">(.*?)</figure>', text, flags=re.DOTALL)
    assert {kind for kind, _ in pairs} == {"right", "fixed", "broken", "wrong"}
    for kind, body in pairs:
        told = re.findall(r'<span class="saw">(before, )?seen: (first|last) &lt;b&gt;', body)
        assert told == {"right": [], "fixed": [("before, ", "first")]}.get(kind, [("", "last")])


def test_one_image_is_no_images(make_run):
    text, _ = check(write_report(make_run(per_category=1)))
    assert "<small>1 image: " in text
    assert not re.search(r"\b1 (images|iterations|checkpoints)\b", text)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model_index.json"], 'DiffusionPipeline.from_pretrained("star-shapes-demo/checkpoints/step-000027/export")'),
        (["lora.safetensors"], 'pipeline.load_lora_weights("star-shapes-demo/checkpoints/step-000027/export")'),
        (["transformer/config.json", "README.md"], 'subfolder="transformer"'),
    ],
)
def test_the_page_says_how_to_use_the_result(make_run, files, words):
    run = make_run()
    for name in files:
        path = run / "checkpoints" / "step-000027" / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    text, _ = check(write_report(run))
    assert words.replace('"', "&#34;") in text
    assert "rlt2i sample star-shapes-demo --prompt" in text
    assert ("export/README.md" in text) == ("README.md" in files)


def test_every_chart_fits_a_phone(make_run):
    text, _ = check(write_report(make_run()))
    charts = re.findall(r'<div class="card ?([^"]*)">\s*<svg [^>]*? width="(\d+)"', text)
    assert len(charts) == text.count('aria-label="') - text.count('aria-label="from ') - 2  # less contents and ramp
    wide, narrow = ([kind for kind, _ in charts if name in kind] for name in ("wide", "narrow"))
    assert len(wide) == len(narrow) == 3
    assert all(int(width) <= 340 for kind, width in charts if "wide" not in kind)
    phone = text[text.index("@media (max-width: 600px)") : text.index("</style>")]
    assert re.search(r"\.wide[^{]*{ display: none; }", phone)
    assert ".narrow { display: block; }" in phone


def test_long_pages_open_with_one_gallery(make_run):
    text, _ = check(write_report(make_run()))
    assert text.count('<details open="open"') == 1
    assert text.count('<details class="card" open="open"') == 1
    order = [text.index(f'<section id="{name}"') for name in SECTIONS]
    assert order == sorted(order)  # the table by category stands second


def test_pass_marks():
    assert has_pass_mark([0, 0.5, 1])
    assert has_pass_mark([0, 0])
    assert not has_pass_mark([0.21, 0.23])
    assert not has_pass_mark([21.0, 23.0])
    assert not has_pass_mark([math.nan])


def test_parts_of_a_recipe_in_any_dialect():
    assert parts({"credit": [{"type": "A"}, {"type": "B"}], "objective": "nft", "sampler": {"name": "SDE"}}) == [
        ("sampler", "SDE"),
        ("credit", "A × B"),
        ("objective", "nft"),
    ]
    assert parts({"algorithm": {"policy": {"SD3": {"rank": 4}}, "reward": {"a": 1, "b": 2}}}) == [("policy", "SD3")]
    assert parts({}) == []


def test_a_composition_reads_as_what_it_is_composed_of():
    attention = {"type": "TextAttention", "mix": 0.5}
    credit = {"type": "Product", "advantage": {"type": "GroupRelative"}, "allocations": [attention], "masks": []}
    assert parts({"credit": credit}) == [("credit", "GroupRelative × TextAttention")]
    credit |= {"allocations": [{"type": "Shuffled", "allocation": attention}], "masks": [{"type": "SlidingWindow"}]}
    assert parts({"credit": credit}) == [("credit", "GroupRelative × Shuffled(TextAttention) × SlidingWindow")]
    assert parts({"credit": {"type": "Product", "advantage": {"type": "Dense"}}}) == [("credit", "Dense")]


def test_the_contract_round_trips(make_run):
    run = make_run(per_category=2)
    images = open_images(run / "images" / "eval-000027.safetensors", 27)
    assert len(images) == 12
    assert images.image(3).shape == (3, 24, 24)
    sample = open_maps(run / "maps" / "step-000027.safetensors")[1]
    assert sample.weights.shape == (10, 12, 12)
    assert sample.core == ("green square",)
    assert len(sample.sigmas) == 11
    torch.testing.assert_close(sample.weights.mean(dim=(1, 2)), torch.ones(10))


def test_marking():
    assert marked("a Red <b> square", ["red", "<b>"]) == [
        ("a ", False), ("Red", True), (" ", False), ("<b>", True), (" square", False)
    ]  # fmt: skip
    assert marked("red", ["", "red square"]) == [("red", False)]
    assert marked("", ["x"]) == []


def test_text_that_would_be_shown_in_another_order_is_spelt_out(make_run):
    assert visible("a\u202eb\u2066c") == "a\\u202eb\\u2066c"
    run = make_run()
    for path in run.glob("images/*"):
        with safe_open(path, "pt") as file:
            prompts = json.loads(file.metadata()["info"])["prompts"]
        rewrite(path, prompts=["not \u202eevil", *prompts[1:]])
    text, _ = check(write_report(run))
    assert "not \\u202eevil" in text
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
