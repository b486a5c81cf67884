"""Conversion of OFA checkpoints: both layouts, the name table on OFA's own key lists, and every refusal."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from golden.weights import fairseq_weights, fork_weights, make_weights, write_fairseq, write_fork, write_vocabulary
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from mue_hf import MuEConfig, MuEForConditionalGeneration
from mue_hf.cli.convert import add_arguments, run
from mue_hf.convert.names import rename, rename_weights
from mue_hf.convert.ofa import convert_ofa, make_config, read_sizes
from mue_hf.model.processing_mue import MuEProcessor


class Stranger:
    """A class that no safe load knows."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return make_weights()


@pytest.fixture(scope="module")
def fork(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fork(tmp_path_factory.mktemp("fork"), weights)


@pytest.fixture(scope="module")
def converted(fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "mue"
    convert_ofa(fork, folder, image_size=64)
    return folder


def empty_target(config: MuEConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = MuEForConditionalGeneration(config)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class TestKeyLists:
    """OFA-tiny's real keys and shapes, in both layouts."""

    @staticmethod
    def read(file: Path) -> dict[str, Tensor]:
        tensors = {}
        for line in file.read_text().splitlines():
            name, shape, dtype, *_ = line.split("\t")
            size = [] if shape == "scalar" else [int(number) for number in shape.split("x")]
            tensors[name] = torch.zeros((), dtype=getattr(torch, dtype)).expand(size)
        return tensors

    @pytest.mark.parametrize("layout", ["hf", "fairseq"])
    def test_every_key_is_consumed_or_dropped_on_purpose(self, shared_dir: Path, layout: str) -> None:
        keys = self.read(shared_dir / "fixtures" / "ofa_keys" / f"keys_{layout}.txt")
        target = empty_target(make_config(keys, {}))
        renamed = rename_weights(keys, target)
        assert renamed.keys() == target.keys()
        consumed = {key for key in keys if rename(key) in target}
        dropped = {key for key in keys if rename(key) is None}
        assert consumed | dropped == set(keys)
        assert {key.split(".", 1)[1] for key in dropped} <= {
            "image_position_idx",
            "image_rp_bucket",
            "token_rp_bucket",
            "version",
        }

    def test_layouts_agree_with_the_key_map(self, shared_dir: Path) -> None:
        folder = shared_dir / "fixtures" / "ofa_keys"
        pairs = [line.split("\t")[:2] for line in (folder / "keymap_fs2hf.tsv").read_text().splitlines()]
        assert {old for old, _ in pairs} == set(self.read(folder / "keys_fairseq.txt"))
        assert {new for _, new in pairs if new != "-"} == set(self.read(folder / "keys_hf.txt"))
        for old, new in pairs:
            assert rename(old) == (None if new == "-" else rename(new)), old

    @pytest.mark.parametrize("layout", ["hf", "fairseq"])
    def test_sizes_are_those_of_the_preset(self, shared_dir: Path, layout: str) -> None:
        keys = self.read(shared_dir / "fixtures" / "ofa_keys" / f"keys_{layout}.txt")
        expected = MuEConfig.from_size("tiny", modality_decomposition=False)
        assert make_config(keys, {}).to_dict() == expected.to_dict()


class TestConvert:
    """Whole conversions of the golden model."""

    def test_fork_loads_at_once(self, converted: Path, weights: dict[str, Tensor]) -> None:
        model, report = MuEForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
        assert not any(report.values())
        assert model.dtype == torch.float32
        assert model.config.modality_decomposition is False
        assert torch.equal(model.lm_head.weight, weights["encoder.embed_tokens.weight"])
        assert model.generation_config.num_beams == 5
        assert model.generation_config.no_repeat_ngram_size == 3
        assert model.generation_config.forced_eos_token_id == 2
        processor = MuEProcessor.from_pretrained(converted)
        assert dict(processor.image_processor.size) == {"height": 64, "width": 64}

    @pytest.mark.parametrize(
        "names",
        [["model.safetensors"], ["a.safetensors", "b.safetensors"], ["a.bin", "b.bin"]],
        ids=["safetensors", "sharded safetensors", "sharded bin"],
    )
    def test_other_files_of_the_fork(
        self, names: list[str], fork: Path, converted: Path, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        source = write_vocabulary(tmp_path / "source")
        (source / "config.json").write_text((fork / "config.json").read_text())
        keys = list(fork_weights(weights))
        shards = {name: keys[index :: len(names)] for index, name in enumerate(names)}
        for name, part in shards.items():
            tensors = {key: fork_weights(weights)[key] for key in part}
            save_file(tensors, source / name) if name.endswith("safetensors") else torch.save(tensors, source / name)
        if len(names) > 1:
            index = "model.safetensors" if names[0].endswith("safetensors") else "pytorch_model.bin"
            weight_map = {key: name for name, part in shards.items() for key in part}
            (source / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        convert_ofa(source, tmp_path / "mue", image_size=64)
        assert same_weights(tmp_path / "mue", converted)

    def test_fairseq_equals_fork(
        self, weights: dict[str, Tensor], fork: Path, converted: Path, tmp_path: Path
    ) -> None:
        file = write_fairseq(tmp_path / "checkpoint_best.pt", weights)
        summary = convert_ofa(file, tmp_path / "mue", vocab=fork, image_size=64)
        assert same_weights(tmp_path / "mue", converted)
        assert summary["layout"] == "fairseq"
        assert summary["trunk_depths"] == [2, 2, 2]
        assert summary["encoder"] == "joint"
        for field, value in {
            "d_model": 32,
            "vocab_size": 400,
            "token_bucket_size": 16,
            "image_bucket_size": 8,
        }.items():
            assert summary[field] == value
        assert summary["parameters"] == sum(
            tensor.numel() for name, tensor in weights.items() if not name.endswith(("running_mean", "running_var"))
        )

    def test_decompose(self, fork: Path, tmp_path: Path) -> None:
        convert_ofa(fork, tmp_path / "mue", decompose=True, image_size=64)
        assert MuEConfig.from_pretrained(tmp_path / "mue").modality_decomposition is True

    def test_half_precision_is_kept(self, weights: dict[str, Tensor], tmp_path: Path) -> None:
        source = write_fork(tmp_path / "source", {name: tensor.half() for name, tensor in weights.items()})
        assert convert_ofa(source, tmp_path / "mue", image_size=64)["dtype"] == "float16"
        stored = load_file(tmp_path / "mue" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}

    def test_settings_are_kept(self, weights: dict[str, Tensor]) -> None:
        config = make_config(
            fork_weights(weights), {"dropout": 0.3, "attn_scale_factor": 1.5, "activation_fn": "relu"}
        )
        assert (config.dropout, config.attn_scale_factor, config.activation_function) == (0.3, 1.5, "relu")

    def test_command_line(self, fork: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        arguments = [str(fork), str(tmp_path / "mue"), "--image-size", "64"]
        assert run(parser.parse_args([*arguments, "--json"])) == 0
        assert json.loads(capsys.readouterr().out)["layout"] == "transformers fork"
        assert run(parser.parse_args([*arguments, "--overwrite"])) == 0
        assert "parameters" in capsys.readouterr().out


class TestRefusals:
    """What cannot be converted says so, and leaves nothing behind."""

    def refuse(self, match: str, source: str | Path, target: Path, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            convert_ofa(source, target, image_size=64, **options)
        assert not target.exists()
        assert not list(target.parent.glob(".*"))

    def test_neither_layout(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "notes.txt").write_text("hello")
        self.refuse("must be an OFA checkpoint: config.json beside one of", tmp_path / "source", tmp_path / "mue")

    def test_converted_already(self, converted: Path, tmp_path: Path) -> None:
        self.refuse("converted already", converted, tmp_path / "mue", vocab=write_vocabulary(tmp_path / "vocab"))

    def test_fairseq_needs_a_vocabulary(self, weights: dict[str, Tensor], tmp_path: Path) -> None:
        file = write_fairseq(tmp_path / "checkpoint.pt", weights)
        self.refuse("pass --vocab DIR", file, tmp_path / "mue")
        self.refuse("lacks vocab.json and merges.txt", file, tmp_path / "mue", vocab=tmp_path)

    def test_file_without_model(self, tmp_path: Path, fork: Path) -> None:
        torch.save({"weights": {}}, tmp_path / "x.pt")
        self.refuse("with a dict `model`, got weights", tmp_path / "x.pt", tmp_path / "mue", vocab=fork)

    def test_foreign_objects_need_the_flag(self, weights: dict[str, Tensor], fork: Path, tmp_path: Path) -> None:
        file = write_fairseq(tmp_path / "checkpoint.pt", weights, task_state=Stranger())
        self.refuse(r"Python objects .*Stranger.* --allow-pickle", file, tmp_path / "mue", vocab=fork)
        convert_ofa(file, tmp_path / "mue", vocab=fork, image_size=64, allow_pickle=True)
        assert (tmp_path / "mue" / "model.safetensors").is_file()

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no zip"], ids=["empty", "text", "zip"])
    def test_damaged_file(self, content: bytes, fork: Path, tmp_path: Path) -> None:
        (tmp_path / "x.pt").write_bytes(content)
        self.refuse("written by torch.save", tmp_path / "x.pt", tmp_path / "mue", vocab=fork)

    def test_damaged_safetensors_and_json(self, fork: Path, tmp_path: Path) -> None:
        source = write_vocabulary(tmp_path / "source")
        (source / "config.json").write_text("{")
        (source / "model.safetensors").write_bytes(b"short")
        self.refuse("must be a safetensors file", source, tmp_path / "mue")
        save_file({"x": torch.zeros(1)}, source / "model.safetensors")
        self.refuse("must be a JSON file", source, tmp_path / "mue")

    def test_missing_shard(self, fork: Path, tmp_path: Path) -> None:
        source = write_vocabulary(tmp_path / "source")
        (source / "config.json").write_text("{}")
        (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "gone.bin"}}')
        self.refuse("missing: gone.bin", source, tmp_path / "mue")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"encoder.layers.0.w_resid": torch.zeros(64)}, "1 tensors that OFA has not: encoder.layers.0.w_resid"),
            ({"decoder.pos_ln.weight": None}, "lacks 1 tensors: model.decoder.pos_ln.weight"),
            ({"decoder.pos_ln.weight": torch.zeros(31)}, r"`decoder.pos_ln.weight` must have the shape \(32,\)"),
            ({"decoder.embed_tokens.weight": torch.zeros(400, 32)}, "must equal the other copies"),
            ({"encoder.embed_tokens.weight": None}, "lacks `encoder.embed_tokens.weight`"),
            ({"encoder.embed_image_positions.weight": torch.zeros(60, 32)}, "must have 50 rows for a grid of 7 x 7"),
        ],
        ids=["unknown", "missing", "shape", "untied", "no embedding", "odd grid"],
    )
    def test_leftovers(self, change: dict[str, Tensor | None], match: str, weights: dict[str, Tensor]) -> None:
        tensors = {key: value for key, value in (fairseq_weights(weights) | change).items() if value is not None}
        with pytest.raises(ValueError, match=match):
            rename_weights(tensors, empty_target(make_config(tensors, {})))

    def test_other_tensor_kinds(self, weights: dict[str, Tensor], fork: Path, tmp_path: Path) -> None:
        file = write_fairseq(tmp_path / "x.pt", weights, model={"encoder.version": 3})
        self.refuse(r"tensors only .* encoder.version \(int\)", file, tmp_path / "mue", vocab=fork)

    def test_integer_weights(self, weights: dict[str, Tensor], fork: Path, tmp_path: Path) -> None:
        name = "encoder.layers.0.fc1.weight"
        file = write_fairseq(tmp_path / "x.pt", weights | {name: weights[name].to(torch.int8)})
        self.refuse(
            r"fc1.weight` must have weights of torch.float32, got torch.int8", file, tmp_path / "mue", vocab=fork
        )

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"d_model": 64}, "`d_model` must be 32, as the shapes"),
            ({"scale_embedding": True}, "`scale_embedding` must be False"),
            ({"disable_entangle": False}, "`disable_entangle` must be True"),
        ],
        ids=["other size", "scaled embedding", "entangled positions"],
    )
    def test_settings_that_contradict(
        self, settings: dict[str, object], match: str, weights: dict[str, Tensor]
    ) -> None:
        with pytest.raises(ValueError, match=match):
            make_config(fork_weights(weights), settings)

    def test_no_weights_at_all(self) -> None:
        with pytest.raises(ValueError, match="is it an OFA checkpoint"):
            read_sizes({})

    def test_destination(self, fork: Path, tmp_path: Path) -> None:
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "thesis.txt").write_text("precious")
        for options, match in (({}, "must be empty or new"), ({"overwrite": True}, "has no config.json")):
            with pytest.raises(ValueError, match=match):
                convert_ofa(fork, tmp_path / "used", image_size=64, **options)
        with pytest.raises(ValueError, match="must be a folder, got the file"):
            convert_ofa(fork, tmp_path / "used" / "thesis.txt", image_size=64)
        assert (tmp_path / "used" / "thesis.txt").read_text() == "precious"

    def test_source_is_not_overwritten(self, fork: Path) -> None:
        with pytest.raises(ValueError, match="must not be the folder of the source"):
            convert_ofa(fork, fork, image_size=64, overwrite=True)
        assert (fork / "pytorch_model.bin").is_file()

    def test_folder_around_the_source_is_not_overwritten(self, weights: dict[str, Tensor], tmp_path: Path) -> None:
        source = write_fork(tmp_path / "run" / "last", weights)
        (tmp_path / "run" / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="must not be the folder of the source"):
            convert_ofa(source, tmp_path / "run", image_size=64, overwrite=True)
        assert (source / "pytorch_model.bin").is_file()

    def test_image_size(self, fork: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="between 1 and 128.*got 480; pass --image-size"):
            convert_ofa(fork, tmp_path / "mue")

    def test_other_vocabulary(self, fork: Path, tmp_path: Path) -> None:
        vocab = write_vocabulary(tmp_path / "vocab")
        words = list(json.loads((vocab / "vocab.json").read_text()))
        (vocab / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words[::-1])}))
        self.refuse("`bos_token_id` must be 0", fork, tmp_path / "mue", vocab=vocab)
        longer = words + [f"word{index}" for index in range(400 - len(words) + 1)]
        (vocab / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(longer)}))
        self.refuse("must fit the checkpoint's 400 embeddings, got 401", fork, tmp_path / "mue", vocab=vocab)

    def test_failed_write_leaves_nothing(self, fork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: MuEProcessor, folder: str | os.PathLike) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(MuEProcessor, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            convert_ofa(fork, tmp_path / "mue", image_size=64)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("no/such/path", "must exist or be a Hub repository"),
            ("gone.pt", "must exist or be a Hub repository"),
            ("org/gone", r"download failed \(LocalEntryNotFoundError\)"),
        ],
        ids=["path", "file", "repository"],
    )
    def test_no_such_source(self, name: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        self.refuse(match, name, tmp_path / "mue")

    def test_hub_repository(
        self, fork: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mue_hf.convert.read.snapshot_download", lambda name, allow_patterns: str(fork))
        convert_ofa("org/ofa", tmp_path / "mue", image_size=64)
        assert same_weights(tmp_path / "mue", converted)
