"""`mue-hf app`: what its page shows, on a tiny checkpoint; and the page itself, in a headless Chromium where there is
one, which leaves a screenshot in build/app.png."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

import pytest
import torch
from bulk_fixtures import BALANCED
from conftest import tiny_config, tiny_inputs, tiny_model
from PIL import Image

from mue_hf import ExitOptions, MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.app import page as app_page
from mue_hf.app.explain import depth_map, draw_signals, record_signals
from mue_hf.app.page import build_page, find_photos, serve
from mue_hf.app.results import caption_photo, judge_statement, show_figures
from mue_hf.app.settings import exit_choice, preset_names, slider_values
from mue_hf.evaluation.signals import SignalRecorder

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "examples" / "photos" / "cat.jpg"
SMALL_CHECKPOINT = ROOT / "checkpoints" / "mue-photos-small"
# A few tokens exit after each layer.
MIDDLE = {"image_exit_threshold": 0.6, "text_exit_threshold": 0.99, "decoder_exit_threshold": 0.5}
# The photo that is picked on the page, and seconds that an answer of the page may take on a busy machine.
PICKED, SECONDS = "photographer.jpg", 60


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = MuEForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
    return model, MuEProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photo():
    with Image.open(PHOTO) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def encoded(loaded, photo):
    inputs = loaded[1](images=photo)
    return dict(inputs) | {"pixel_values": inputs["pixel_values"].double()}


class TestSettings:
    def test_presets(self, loaded):
        shipped = ["paper-captioning", "paper-entailment", "released-captioning", "released-entailment"]
        assert preset_names(loaded[0]) == ["full depth", "balanced", *shipped]

    def test_presets_of_the_other_encoder_are_left_out(self):
        model = MuEForConditionalGeneration(tiny_config(modality_decomposition=False))
        assert preset_names(model) == ["full depth"]
        names = ["encoder_exit_threshold", "decoder_exit_threshold", "exit_decay_beta", "exit_decay_tau"]
        assert list(slider_values(model, "full depth")) == names

    @pytest.mark.parametrize(
        ("threshold", "place"),
        [(None, 1.0), (2.0, 1.0), (-2.0, 0.0), (0.12345, 0.123), ([None, 0.2, 0.4], 0.3), ([None] * 3, 1.0)],
        ids=["never", "above 1", "below 0", "in steps", "median", "never in any layer"],
    )
    def test_where_a_slider_stands(self, loaded, monkeypatch, threshold, place):
        presets = {"this": {"decoder_exit_threshold": threshold, "image_exit_threshold": 0.5}}
        monkeypatch.setattr(loaded[0].generation_config, "exit_presets", presets)
        values = slider_values(loaded[0], "this")
        assert values["decoder_exit_threshold"] == place
        assert (values["image_exit_threshold"], values["exit_decay_beta"], values["exit_decay_tau"]) == (0.5, 1, 1)

    @pytest.mark.parametrize("preset", ["balanced", "paper-captioning"])
    def test_sliders_that_stay_leave_a_preset_as_it_is(self, loaded, preset):
        model = loaded[0]
        assert exit_choice(model, preset, slider_values(model, preset)) == {"exit_preset": preset}

    def test_a_moved_slider_replaces_its_part(self, loaded):
        values = slider_values(loaded[0], "balanced") | {"decoder_exit_threshold": 1}
        exits = {"exit_preset": "balanced", "decoder_exit_threshold": 1.0}
        assert exit_choice(loaded[0], "balanced", values) == exits

    def test_full_depth_until_a_slider_is_moved(self, loaded):
        values = slider_values(loaded[0], "full depth")
        assert exit_choice(loaded[0], "full depth", values) == {"exit_criterion": "never"}
        values["image_exit_threshold"] = 0.5
        exits = exit_choice(loaded[0], "full depth", values)
        assert exits == {"exit_criterion": "similarity"} | values

    def test_photos(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_photos(None) == []
        for name in ("b.JPG", "a.png", "notes.txt"):
            (tmp_path / name).touch()
        assert [path.name for path in find_photos(tmp_path)] == ["a.png", "b.JPG"]


class TestExplanation:
    def test_the_signals_are_those_that_decided(self, loaded, encoded):
        model = loaded[0]
        output = model.generate(**encoded, **MIDDLE, num_beams=3, return_dict_in_generate=True)
        depths = output.decoder_exit_layers[0]
        assert len(set(depths.tolist())) > 1
        signals = record_signals(model, encoded, output.sequences[0, 1:].tolist(), MIDDLE)

        assert (~signals["decoder"].isnan()).sum(1).tolist() == depths.tolist()
        assert int((~signals["image"].isnan()).sum()) == output.image_exit_layers[0]
        assert int((~signals["text"].isnan()).sum()) == output.text_exit_layers[0]
        for cosines, depth in zip(signals["decoder"], depths.tolist(), strict=True):
            assert (cosines[: depth - 1] <= MIDDLE["decoder_exit_threshold"]).all()
            assert depth == 3 or cosines[depth - 1] > MIDDLE["decoder_exit_threshold"]

    def test_what_ran_is_part_of_what_all_layers_say(self, loaded, encoded):
        signals = record_signals(loaded[0], encoded, [9, 10], MIDDLE)
        for name in ("image", "text"):
            ran = ~signals[name].isnan()
            whole = signals[f"{name} at full depth"]
            assert whole.shape == (1, 3) and not whole.isnan().any()
            assert torch.equal(signals[name][ran], whole[ran])

    def test_rows_of_a_batch_end_where_they_exited(self, loaded, encoded):
        inputs = {name: value.expand(3, *value.shape[1:]) for name, value in encoded.items()}
        inputs["pixel_values"] = inputs["pixel_values"] * torch.tensor([1.0, 0.1, -1.0]).double()[:, None, None, None]
        with SignalRecorder(loaded[0]) as recorder:
            output = loaded[0].generate(**inputs, **MIDDLE, return_dict_in_generate=True)
        signals = recorder.signals
        ran = ~signals.decoder.isnan()
        assert ran.sum(1).tolist() == output.decoder_exit_layers.flatten().tolist()
        assert signals.agreeing[~ran].all()
        assert (~signals.encoder["image"].isnan()).sum(1).tolist() == output.image_exit_layers.tolist()

    @pytest.mark.parametrize(
        ("exits", "panels"),
        [
            (MIDDLE, ["image stream", "text stream", "decoder, each token"]),
            ({"exit_preset": "paper-captioning"}, ["image stream", "text stream", "decoder, each token"]),
            ({"exit_criterion": "confidence", "decoder_exit_threshold": 0.5}, ["image stream", "text stream"]),
        ],
        ids=["similarity", "with decay", "no similarity in the decoder"],
    )
    def test_curves(self, loaded, photo, exits, panels):
        pytest.importorskip("matplotlib", reason="the curves need the extra: pip install mue-hf[app]")
        record, figure = caption_photo(*loaded, photo, exits, 1)
        assert [axes.get_title() for axes in figure.axes] == panels
        if panels[-1].startswith("decoder"):
            dots = [line for line in figure.axes[-1].lines if line.get_marker() == "o"]
            assert [int(line.get_xdata()[0]) for line in dots] == [token["layers"] for token in record["tokens"]]

    def test_curves_of_the_joint_encoder(self):
        pytest.importorskip("matplotlib", reason="the curves need the extra: pip install mue-hf[app]")
        model = tiny_model(modality_decomposition=False)
        exits = {"encoder_exit_threshold": 0.9, "decoder_exit_threshold": 0.9}
        signals = record_signals(model, tiny_inputs(batch=1), [5, 6, 7], exits)
        assert [tuple(values.shape) for values in signals.values()] == [(1, 3), (1, 3), (3, 4)]
        figure = draw_signals(signals, ExitOptions.from_dict(exits, model.config), 20)
        assert [axes.get_title() for axes in figure.axes] == ["encoder stream", "decoder, each token"]
        # One between any two layers, for tokens of the first and of the last.
        assert [len(axes.collections) for axes in figure.axes] == [2, 6]

    def test_depth_map(self):
        table = depth_map([("image", 1, 2), ("<b>", 3, 3)])
        assert table.count(" ran") == 4
        assert table.count(" skipped") == 2
        assert "<b>" not in table and "&lt;b&gt;" in table


def test_the_record_is_that_of_the_command(loaded, photo, encoded):
    pytest.importorskip("matplotlib", reason="the curves need the extra: pip install mue-hf[app]")
    model, processor = loaded
    record, _ = caption_photo(model, processor, photo, MIDDLE, 1)
    output = model.generate(**encoded, **MIDDLE, return_dict_in_generate=True)
    assert [token["id"] for token in record["tokens"]] == output.sequences[0, 1:].tolist()
    assert [token["layers"] for token in record["tokens"]] == output.decoder_exit_layers[0].tolist()
    shown = show_figures(model, record, MIDDLE, 1)
    assert f"<b>{record['flops_skipped']:.0%}</b>FLOPs skipped" in shown
    assert f"<b>{1000 * record['seconds']:.0f} ms</b>with exits" in shown
    assert "decoder_exit_threshold=0.5" in shown


def test_a_statement_is_judged_by_score_answers(loaded, photo):
    model, processor = loaded
    record = judge_statement(model, processor, photo, "a cat is looking up", BALANCED, 1)
    inputs = processor(images=photo, task="entailment", hypothesis="a cat is looking up")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    answers = processor.encode_answers(["yes", "no", "maybe"])
    for name, exits in (("probabilities", BALANCED), ("full_depth_probabilities", {})):
        expected = model.score_answers(answers, **inputs, **exits).exp()[0]
        assert record[name] == pytest.approx(dict(zip(("yes", "no", "maybe"), expected.tolist(), strict=True)))
    assert (record["image_exit_layers"], record["text_exit_layers"]) == (1, 3)
    assert set(record["answer_exit_layers"]) == {1}


def test_the_room_is_imported_without_its_extras():
    program = "import sys; sys.modules.update(gradio=None, matplotlib=None, datasets=None); import mue_hf.cli.app"
    subprocess.run([sys.executable, "-c", program], check=True)


class TestCommand:
    def test_help_shows_an_example(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["app", "--help"])
        assert "mue-hf app --model" in capsys.readouterr().out

    @pytest.mark.parametrize("package", ["gradio", "matplotlib"])
    def test_a_missing_extra_is_named(self, package, capsys, monkeypatch):
        find = app_page.find_spec
        monkeypatch.setattr(app_page, "find_spec", lambda name: None if name == package else find(name) or sys)
        assert cli.main(["app", "--model", "nosuch"]) == 2
        assert capsys.readouterr().err == (
            f"mue-hf app: The page needs {package}, not installed here: pip install 'mue-hf[app]'\n"
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "`--model` is needed"),
            (["--model", "no/such/folder"], "no/such/folder"),
            (["--photos", "."], "`--photos` must be a folder with images"),
        ],
        ids=["no model", "missing model", "no photos"],
    )
    def test_bad_input_is_a_message_and_code_2(self, arguments, message, capsys, monkeypatch, tmp_path):
        pytest.importorskip("gradio", reason="the page needs the extra: pip install mue-hf[app]")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["app", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_a_taken_port(self, checkpoint, capsys):
        pytest.importorskip("gradio", reason="the page needs the extra: pip install mue-hf[app]")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert cli.main(["app", "--model", str(checkpoint), "--port", str(port)]) == 2
        assert str(port) in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(loaded):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install mue-hf[app]")
    return build_page(*loaded, photos=[PHOTO], repeats=1)


@pytest.fixture(scope="module")
def refresh(page):
    """What the page does when something on it changes."""
    return next(event.fn for event in page.fns.values() if event.fn.__name__ == "refresh")


class TestPage:
    VALUES = (0.6, 0.99, 0.5, 1, 1)

    def test_a_caption(self, refresh, photo):
        shown = {
            component.elem_id: value
            for component, value in refresh("caption", photo, "", "balanced", *self.VALUES).items()
        }
        assert shown["caption"] and shown["full_caption"]
        assert "image_exit_threshold=0.6" in shown["figures"]
        assert "<table" in shown["depths"]

    def test_a_judgement(self, refresh, photo):
        probabilities, full, *_ = refresh("entailment", photo, "a cat", "full depth", *[1] * 5).values()
        assert probabilities == pytest.approx(full)
        assert sum(full.values()) == pytest.approx(1)

    @pytest.mark.parametrize(("tab", "statement"), [("caption", ""), ("entailment", " "), ("entailment", None)])
    def test_nothing_to_do(self, refresh, photo, tab, statement):
        import gradio

        picture = None if tab == "caption" else photo
        assert refresh(tab, picture, statement, "balanced", *self.VALUES) == gradio.skip()

    def test_a_refusal_is_shown(self, refresh, photo):
        import gradio

        with pytest.raises(gradio.Error, match="`exit_decay_tau`"):
            refresh("caption", photo, "", "balanced", 1, 1, 0.5, 1, -1)


def test_the_space_serves_the_page(checkpoint, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs the extra: pip install mue-hf[app]")
    served = []
    monkeypatch.setattr("mue_hf.app.serve", served.append)
    monkeypatch.setenv("MODEL", str(checkpoint))
    run_path(str(ROOT / "examples" / "space" / "app.py"), run_name="__main__")
    assert [page.title for page in served] == ["mue_hf"]


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="a browser is driven by: pip install selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("headless Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1360,1330",
        f"user-data-dir={tmp_path}",
    ):
        options.add_argument(f"--{flag}")
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


@pytest.fixture
def address():
    """The page of the checkpoint in the repository."""
    pytest.importorskip("gradio", reason="the page needs the extra: pip install mue-hf[app]")
    pytest.importorskip("timm", reason="the small checkpoint's trunk needs the extra: pip install mue-hf[timm]")
    model = MuEForConditionalGeneration.from_pretrained(SMALL_CHECKPOINT, dtype=torch.float32).eval()
    page = build_page(model, MuEProcessor.from_pretrained(SMALL_CHECKPOINT), find_photos(PHOTO.parent), 1)
    _, address, _ = serve(page, prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


def test_in_a_browser(browser, address):
    def find(selector: str):
        return browser.find_element("css selector", selector)

    def wait_until(condition) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"not within {SECONDS} s; the page says: {find('body').text}"
            time.sleep(0.2)

    def depths() -> list[int]:
        return [int(cell.text) for cell in browser.find_elements("css selector", "#depths tfoot tr:first-child td")]

    def is_idle() -> bool:
        # What a component shows while the page waits for its value.
        return not any(word in find("body").text for word in ("processing |", "queue:"))

    picked = [path.name for path in find_photos(PHOTO.parent)].index(PICKED)
    browser.get(address)
    wait_until(lambda: browser.find_elements("css selector", "#photos button"))
    browser.execute_script("arguments[0].click()", browser.find_elements("css selector", "#photos button")[picked])
    wait_until(lambda: browser.find_elements("css selector", "#curves img") and is_idle())
    caption, full_caption = (find(f"#{name} textarea").get_attribute("value") for name in ("caption", "full_caption"))
    assert caption and full_caption
    assert "exit_preset='balanced'." in find("#figures").text
    assert f"{caption.split()[0]} " in find("#depths").text

    # The right arrow until 0.975, each time a step of 0.001: above what most tokens had exited at.
    before, slider = depths(), find("#decoder_exit_threshold input[type=range]")
    slider.send_keys("\ue014" * round(1000 * (0.975 - float(slider.get_attribute("value")))))
    wait_until(lambda: "decoder_exit_threshold=0.975." in find("#figures").text and is_idle())
    assert sum(depths()[2:]) > sum(before[2:])
    assert depths()[:2] == before[:2]
    picture = ROOT / "build" / "app.png"
    picture.parent.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(picture))
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
