"""Scores: published values reached, intervals over images, and clear words where Java or jars are missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EvalPrediction

from mue_hf.metrics import (
    CAPTION_MODULE,
    ENTAILMENT_MODULE,
    bootstrap_interval,
    caption_metrics,
    caption_scores,
    entailment_metrics,
    entailment_scores,
)

pytest.importorskip("pycocoevalcap", reason="caption scores need the extra `eval`")

from mue_hf.metrics import java, scorers  # noqa: E402

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="PTB tokenizer and METEOR need a Java runtime")
WITHOUT_JAVA = {"metrics": ("bleu", "rouge_l", "cider"), "tokenizer": "plain"}

CAPTIONS = ["a dog runs on the grass", "two men sit at a table", "a red bus", "a cat"]
REFERENCES = [
    ["A dog runs across the grass.", "the brown dog is running"],
    ["Two men are sitting at a table!", "two people at a table"],
    ["a red bus drives down the street", "a double-decker bus"],
    ["a black cat sleeps", "the cat is asleep on a bed"],
]


@pytest.fixture(scope="module")
def coco(shared_dir) -> tuple[list[str], list[list[str]]]:
    """The 1,000 already tokenized captions of COCO's example."""
    folder = shared_dir / "fixtures" / "caption_metrics"
    references, captions = (json.loads((folder / name).read_text()) for name in ("gts.json", "res.json"))
    return [captions[image][0] for image in references], list(references.values())


@pytest.fixture(scope="module")
def nlg_eval(shared_dir) -> tuple[list[str], list[tuple[str, str]]]:
    """The two sentences of nlg-eval's example."""
    folder = shared_dir / "fixtures" / "caption_metrics"
    captions, *references = ((folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2"))
    return captions, list(zip(*references, strict=True))


class TestPublishedValues:
    @needs_java
    def test_coco_example(self, coco):
        scores = caption_scores(*coco, tokenizer="pretokenized", resamples=200, per_image=True)
        intervals, per_image = scores.pop("intervals"), scores.pop("per_image")
        published = {
            "bleu_1": 0.579,
            "bleu_2": 0.404,
            "bleu_3": 0.279,
            "bleu_4": 0.191,
            "meteor": 0.195255,
            "rouge_l": 0.396253,
            "cider": 0.599791,
        }
        assert list(scores) == [f"{name}_pretokenized" for name in published]
        for name, value in published.items():
            label = f"{name}_pretokenized"
            assert scores[label] == pytest.approx(value, abs=5e-4 if name.startswith("bleu") else 5e-7), name
            low, high = intervals[label]
            assert low < scores[label] < high < low + 0.15, name
            assert len(per_image[label]) == 1000

    @needs_java
    def test_nlg_eval_example_under_a_language_with_decimal_commas(self, nlg_eval, monkeypatch):
        monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=ISO-8859-1")
        scores = caption_scores(*nlg_eval)
        published = {"bleu_4": 0.201143, "meteor": 0.295797, "rouge_l": 0.522104, "cider": 1.242192}
        assert {name: scores[name] for name in published} == pytest.approx(published, abs=5e-7)

    @needs_java
    def test_ptb_tokenizer_leaves_the_coco_example_nearly_as_it_is(self, coco):
        scores = caption_scores(*coco, metrics=["bleu", "cider"])
        assert scores["bleu_4"] == pytest.approx(0.190829, abs=5e-7)
        assert scores["cider"] == pytest.approx(0.599895, abs=5e-7)

    def test_spice_of_the_coco_example(self, coco):
        try:
            java.require_spice()
        except RuntimeError as error:
            pytest.skip(str(error))
        assert caption_scores(*coco, metrics=["spice"])["spice"] == pytest.approx(0.133, abs=5e-4)


class TestTokenizers:
    @needs_java
    def test_ptb_keeps_one_line_per_caption(self):
        texts = ['A café\'s dog, "x".', "", "...", "你好 world", "Mr. Smith", "", ""]
        assert java.ptb_tokenize(texts) == ["a café 's dog x", "", "", "你好 world", "mr. smith", "", ""]

    @needs_java
    def test_white_space_inside_a_caption_does_not_end_its_line(self):
        broken = [
            caption.replace(" ", separator, 1) for caption, separator in zip(CAPTIONS, "\n\r\x85\u2028", strict=True)
        ]
        options = {"metrics": ["bleu", "cider"], "per_image": True}
        assert caption_scores(broken, REFERENCES, **options) == caption_scores(CAPTIONS, REFERENCES, **options)

    def test_plain_scores_are_labelled(self):
        scores = caption_scores(CAPTIONS, REFERENCES, per_image=True, resamples=5, **WITHOUT_JAVA)
        names = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
        labels = [f"{name}_plain" for name in names]
        assert list(scores) == [*labels, "per_image", "intervals"]
        assert list(scores["per_image"]) == list(scores["intervals"]) == labels

    def test_plain_ignores_case_and_punctuation(self):
        shouted = [caption.upper() + " !" for caption in CAPTIONS]
        scores = caption_scores(shouted, REFERENCES, **WITHOUT_JAVA)
        assert scores == caption_scores(CAPTIONS, REFERENCES, **WITHOUT_JAVA)


class TestCaptionScores:
    def test_per_image_scores_average_to_the_corpus(self):
        scores = caption_scores(CAPTIONS, REFERENCES, per_image=True, **WITHOUT_JAVA)
        for name in ("rouge_l_plain", "cider_plain"):
            assert np.mean(scores["per_image"][name]) == pytest.approx(scores[name])

    def test_a_perfect_caption_and_an_empty_one(self):
        captions = ["a dog runs across the grass", "", "a red bus drives down the street", ""]
        references = [[candidates[0]] for candidates in REFERENCES]
        per_image = caption_scores(captions, references, per_image=True, **WITHOUT_JAVA)["per_image"]
        assert per_image["rouge_l_plain"] == [1, 0, 1, 0]
        assert per_image["cider_plain"] == pytest.approx([10, 0, 10, 0])

    def test_resampled_bleu_is_that_of_the_drawn_images(self):
        weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 0, 4, 0]])
        resampled = scorers.bleu(CAPTIONS, REFERENCES, weights)
        for row, counts in enumerate(weights.astype(int)):
            drawn = np.repeat(np.arange(4), counts)
            alone = scorers.bleu(
                [CAPTIONS[i] for i in drawn], [REFERENCES[i] for i in drawn], np.empty((0, len(drawn)))
            )
            for name, score in alone.items():
                assert resampled[name].resampled[row] == pytest.approx(score.value, rel=1e-12)

    def test_bleu_of_nothing_is_zero(self):
        assert np.all(scorers.bleu_of(np.zeros((1, 10))) < 1e-5)
        assert np.all(scorers.bleu_of(np.array([[0.0, 12, *[0] * 8]])) == 0)

    def test_equal_seeds_give_equal_intervals(self):
        first, second, other = (
            caption_scores(CAPTIONS, REFERENCES, resamples=50, seed=seed, **WITHOUT_JAVA)["intervals"]
            for seed in (3, 3, 4)
        )
        assert first == second != other

    def test_result_is_json(self):
        scores = caption_scores(CAPTIONS, REFERENCES, per_image=True, resamples=5, **WITHOUT_JAVA)
        assert set(json.loads(json.dumps(scores))) == set(scores)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"predictions": []}, "one entry per image, got 0 and 4", id="none"),
            pytest.param({"predictions": CAPTIONS[:3]}, "one entry per image, got 3 and 4", id="too-few"),
            pytest.param({"predictions": [["a dog"]] * 4}, r"`predictions\[0\]` must be a text", id="nested"),
            pytest.param(
                {"references": CAPTIONS}, r"`references\[0\]` must be a list of texts, got 'a dog", id="flat"
            ),
            pytest.param(
                {"references": [["a"], [], ["a"], ["a"]]}, r"`references\[1\]` .* got \[\]", id="no-reference"
            ),
            pytest.param(
                {"references": [["a"]] * 3 + [["...", ""]]}, r"`references\[3\]` must hold words", id="wordless"
            ),
            pytest.param({"metrics": ["bleu4"]}, r"`metrics` must be a list out of .* got \['bleu4'\]", id="metric"),
            pytest.param({"metrics": "cider"}, "`metrics` must be a list", id="metric-text"),
            pytest.param({"metrics": []}, "`metrics` must be a list", id="no-metric"),
            pytest.param({"tokenizer": "spacy"}, "`tokenizer` must be one of .* 'spacy'", id="tokenizer"),
            pytest.param({"resamples": -1}, "`resamples` must be 0", id="resamples"),
            pytest.param({"confidence": 95}, "`confidence` must be above 0 and below 1, got 95", id="confidence"),
        ],
    )
    def test_refuses_bad_input(self, changes, message):
        arguments = {"predictions": CAPTIONS, "references": REFERENCES} | WITHOUT_JAVA | changes
        with pytest.raises(ValueError, match=message):
            caption_scores(arguments.pop("predictions"), arguments.pop("references"), **arguments)


class TestJava:
    @pytest.mark.parametrize("options", [{}, {"tokenizer": "plain"}, {"metrics": ["cider"]}, {"metrics": ["spice"]}])
    def test_missing_java_says_what_to_install(self, options, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match='`java` is on PATH. Install one .*default-jre.*`tokenizer="plain"`'):
            caption_scores(CAPTIONS, REFERENCES, **options)

    def test_missing_jars_are_named_and_not_downloaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(java, "require_java", lambda purpose: "java")
        monkeypatch.setattr(java, "scorer_folder", lambda name: tmp_path)
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "stanford-corenlp-3.6.0.jar").touch()
        with pytest.raises(RuntimeError, match=r"missing in .*lib: stanford-corenlp-3.6.0-models.jar. Take .*\.zip"):
            caption_scores(CAPTIONS, REFERENCES, metrics=["spice"], tokenizer="plain")

    def test_failing_spice_names_the_java_that_it_needs(self, monkeypatch):
        def fail(*_: object) -> None:
            raise subprocess.CalledProcessError(1, "java")

        monkeypatch.setattr(scorers, "Spice", lambda: SimpleNamespace(compute_score=fail))
        with pytest.raises(RuntimeError, match="exit status 1; .* Java 8"):
            scorers.spice(CAPTIONS, REFERENCES, np.empty((0, 4)))

    def test_spice_takes_the_f_score_of_each_image(self, monkeypatch):
        f_scores = [0.1, 0.2, 0.3, 0.6]
        result = (None, [{"All": {"f": value}, "Object": {"f": 1.0}} for value in f_scores])
        monkeypatch.setattr(scorers, "Spice", lambda: SimpleNamespace(compute_score=lambda *_: result))
        score = scorers.spice(CAPTIONS, REFERENCES, np.eye(4) * 4)["spice"]
        assert score.value == pytest.approx(0.3)
        assert score.resampled == pytest.approx(f_scores)

    @pytest.fixture
    def fake_java(self, tmp_path, monkeypatch):
        """Puts a program `java` on PATH that does what the given Python code says."""

        def install(code: str) -> None:
            program = tmp_path / "java"
            program.write_text(f"#!{sys.executable}\n{code}\n")
            program.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path))

        return install

    def test_failing_tokenizer_shows_its_message(self, fake_java):
        fake_java("import sys; sys.exit('no such class')")
        with pytest.raises(RuntimeError, match=r"gave 0 lines for 12 \(exit status 1\): no such class"):
            caption_scores(CAPTIONS, REFERENCES, metrics=["cider"])

    def test_failing_meteor_shows_its_message(self, fake_java):
        fake_java("import sys; input(); sys.exit('out of memory')")
        with pytest.raises(RuntimeError, match=r"METEOR ended early \(exit status 1\): out of memory"):
            caption_scores(CAPTIONS, REFERENCES, metrics=["meteor"], tokenizer="plain")

    def test_meteor_is_not_left_running(self, fake_java):
        fake_java("while True: print(*input().split(), flush=True)")
        with pytest.raises(KeyboardInterrupt), java.Meteor() as meteor:
            assert meteor._process.poll() is None
            raise KeyboardInterrupt
        assert meteor._process.returncode is not None

    def test_meteor_hears_no_separator_inside_a_caption(self, fake_java):
        # Answers with the number of parts, where five belong to the command, two references and a caption.
        fake_java("while True: print(len(input().split('|||')), flush=True)")
        with java.Meteor() as meteor:
            assert meteor.statistics(["a ||| b"], [["c", "d ||| e"]]).tolist() == [[4.0]]


class TestEntailmentScores:
    PREDICTIONS = ["yes", "no", "no", "maybe", "yes", "perhaps"]
    TRUE = ["yes", "no", "yes", "maybe", "maybe", "maybe"]

    def test_by_hand(self):
        scores = entailment_scores(self.PREDICTIONS, self.TRUE)
        assert scores == pytest.approx(
            {
                "accuracy": 3 / 6,
                "recall_maybe": 1 / 3,
                "precision_maybe": 1.0,
                "f1_maybe": 1 / 2,
                "support_maybe": 3,
                "recall_no": 1.0,
                "precision_no": 1 / 2,
                "f1_no": 2 / 3,
                "support_no": 1,
                "recall_yes": 1 / 2,
                "precision_yes": 1 / 2,
                "f1_yes": 1 / 2,
                "support_yes": 2,
            }
        )

    def test_a_class_that_does_not_occur_scores_zero(self):
        scores = entailment_scores(["yes", "yes"], ["yes", "yes"], labels=["yes", "no"], resamples=10)
        assert (scores["accuracy"], scores["recall_no"], scores["precision_no"], scores["support_no"]) == (1, 0, 0, 0)
        assert scores["intervals"]["recall_no"] == (0, 0)

    def test_per_image_accuracy_in_order_of_appearance(self):
        scores = entailment_scores(self.PREDICTIONS, self.TRUE, image_ids=[*"babacc"], per_image=True)
        assert scores["per_image"] == {"accuracy": [0.5, 1.0, 0.0]}

    def test_pairs_of_one_image_are_drawn_together(self):
        """100 images, whose 10 pairs are all right or all wrong, say no more than 100 pairs do."""
        right = np.random.default_rng(0).random(100) < 0.6
        answers = ["yes" if ok else "no" for ok in right]
        images = np.repeat(np.arange(100), 10).tolist()
        options = {"labels": ["yes", "no"], "resamples": 1000}
        small = entailment_scores(answers, ["yes"] * 100, **options)["intervals"]["accuracy"]
        large = np.repeat(answers, 10).tolist()
        clustered = entailment_scores(large, ["yes"] * 1000, image_ids=images, **options)["intervals"]["accuracy"]
        naive = entailment_scores(large, ["yes"] * 1000, **options)["intervals"]["accuracy"]
        assert clustered == pytest.approx(small)
        assert np.ptp(naive) < 0.5 * np.ptp(clustered)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"predictions": []}, "one entry per pair, got 0 and 2", id="none"),
            pytest.param({"labels": ["yes"]}, r"`references\[1\]` must be one of \['yes'\], got 'no'", id="label"),
            pytest.param({"image_ids": ["a"]}, "`image_ids` must name the image .* got 1 for 2", id="image-ids"),
            pytest.param({"confidence": 1}, "`confidence` must be", id="confidence"),
        ],
    )
    def test_refuses_bad_input(self, changes, message):
        arguments = {"predictions": ["yes", "no"], "references": ["yes", "no"]} | changes
        with pytest.raises(ValueError, match=message):
            entailment_scores(arguments.pop("predictions"), arguments.pop("references"), **arguments)


class TestBootstrapInterval:
    def test_covers_the_mean_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        covered = 0
        for seed in range(200):
            # Images of different sizes, whose outputs share half of their spread.
            sizes = rng.integers(1, 6, 80)
            shared = rng.normal(size=80)
            values = np.repeat(shared, sizes) + rng.normal(size=sizes.sum())
            image_ids = np.repeat(np.arange(80), sizes).tolist()
            low, high = bootstrap_interval(values, image_ids, resamples=300, seed=seed)
            covered += low <= 0 <= high
        # 95 % of 200 are 190; fewer than 178 have probability .0002. Drawing single outputs covers 151 times.
        assert covered >= 178

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"values": []}, "`values` must be one number per output"),
            ({"values": [1.0], "resamples": 0}, "`resamples` must be at least 1, got 0"),
            ({"values": [1.0], "image_ids": []}, "`image_ids` must name the image"),
        ],
        ids=["values", "resamples", "image-ids"],
    )
    def test_refuses_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(**arguments)


class WordProcessor:
    """Stands in for `MuEProcessor`: token i is word i, and 0 and 1 are special."""

    words = ("<s>", "<pad>", "yes", "no", "maybe", "does", "it", "rain", "a", "red", "bus", "cat")
    entailment_answers = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
    tokenizer = SimpleNamespace(pad_token_id=1)

    def ids(self, *texts: str, padding: int) -> np.ndarray:
        rows = [[self.words.index(word) for word in text.split()] for text in texts]
        width = max(map(len, rows))
        return np.array([row + [padding] * (width - len(row)) for row in rows])

    def post_process_captions(self, ids: np.ndarray) -> list[str]:
        return [" ".join(self.words[i] for i in row if i > 1) for row in ids]


class TestComputeMetrics:
    processor = WordProcessor()

    def test_captions(self):
        texts, references = ["a red bus", "a cat"], [["a red bus", "the bus"], ["the black cat"]]
        prediction = EvalPrediction(self.processor.ids(*texts, padding=-100), np.zeros((2, 1)))
        scores = caption_metrics(self.processor, references, **WITHOUT_JAVA)(prediction)
        assert scores == caption_scores(texts, references, **WITHOUT_JAVA)

    def test_entailment_reads_the_answer_after_the_prompt(self):
        generated = self.processor.ids("<s> does it rain yes", "does it rain maybe", "it no no", "rain", padding=1)
        labels = self.processor.ids("yes", "maybe", "yes", "no", padding=-100)
        scores = entailment_metrics(self.processor)(EvalPrediction(generated, labels))
        assert scores["accuracy"] == 0.5
        assert (scores["recall_entailment"], scores["recall_neutral"], scores["recall_contradiction"]) == (0.5, 1, 0)

    def test_logits_are_refused(self):
        prediction = EvalPrediction(np.zeros((2, 3, 12)), np.zeros((2, 3)))
        with pytest.raises(ValueError, match=r"got shape \(2, 3, 12\); set `predict_with_generate=True`"):
            entailment_metrics(self.processor)(prediction)

    def test_intervals_fit_a_log(self):
        generated = self.processor.ids("yes", "maybe", "no", "rain", padding=1)
        labels = self.processor.ids("yes", "maybe", "yes", "no", padding=-100)
        options = {"resamples": 50, "image_ids": ["a", "a", "b", "c"]}
        scores = entailment_metrics(self.processor, **options)(EvalPrediction(generated, labels))
        expected = entailment_scores(
            ["entailment", "neutral", "contradiction", "rain"],
            ["entailment", "neutral", "entailment", "contradiction"],
            labels=list(self.processor.entailment_answers),
            **options,
        )
        low, high = expected["intervals"]["accuracy"]
        assert (scores["accuracy_low"], scores["accuracy_high"]) == (low, high) and low < 0.5 < high
        assert all(isinstance(value, int | float) for value in scores.values())

    def test_options_that_would_not_fit_a_log_are_refused(self):
        with pytest.raises(TypeError, match=r"got \['per_image'\]"):
            caption_metrics(self.processor, REFERENCES, per_image=True)


class TestEvaluateModules:
    @pytest.fixture
    def load(self, tmp_path, monkeypatch):
        """`evaluate.load` that writes nothing outside of the test's folder."""
        evaluate = pytest.importorskip("evaluate", reason="needs the extra `eval`")
        monkeypatch.setattr(
            evaluate.loading, "init_dynamic_modules", lambda: self.modules_folder(tmp_path, monkeypatch)
        )
        return lambda path: evaluate.load(path, cache_dir=str(tmp_path))

    @staticmethod
    def modules_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        folder = path / f"modules_{path.name}"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(path)
        return str(folder)

    def test_captions(self, load):
        module = load(CAPTION_MODULE)
        module.add_batch(predictions=CAPTIONS[:1], references=REFERENCES[:1])
        module.add_batch(predictions=CAPTIONS[1:], references=REFERENCES[1:])
        assert module.compute(**WITHOUT_JAVA) == caption_scores(CAPTIONS, REFERENCES, **WITHOUT_JAVA)

    def test_entailment(self, load):
        answers, labels, image_ids = ["yes", "no", "no"], ["yes", "no", "yes"], ["a", "a", "b"]
        options = {"image_ids": image_ids, "resamples": 20}
        result = load(ENTAILMENT_MODULE).compute(predictions=answers, references=labels, **options)
        assert result == entailment_scores(answers, labels, **options)
