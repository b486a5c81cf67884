"""Checks the installed wheel from outside the repository: does it do what an editable install does?

Run with the clean environment's `python -I` and the source folder, which is only compared by file names.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import mue_hf
from mue_hf import MuEConfig, MuEForConditionalGeneration
from mue_hf.app.report import draw_report
from mue_hf.publishing.model_card import About, render_card

TRUNK = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "out_features": ["stage2"],
}
RECORD = {
    "caption": "a cat",
    "full_depth_caption": "a cat",
    "encoder_layers": 2,
    "decoder_layers": 2,
    "image_exit_layers": 1,
    "text_exit_layers": 2,
    "tokens": [{"text": " a", "layers": 1}, {"text": " cat", "layers": 2}],
    "layers_skipped": 0.25,
    "flops_skipped": 0.125,
    "seconds": 0.01,
    "full_depth_seconds": 0.02,
}


def names(folder: Path) -> set[str]:
    """The files of a package, without what Python leaves there."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in files}


def main(source: str) -> None:
    """Raises on the first difference."""
    installed = Path(mue_hf.__file__).parent
    if installed.resolve() == Path(source).resolve():
        raise SystemExit("The source folder was imported, not the wheel.")
    if difference := names(installed) ^ names(Path(source)):
        raise SystemExit(f"Files in only one of wheel and source: {sorted(difference)}")

    # those that need no extra to say what they do
    for command in ([], ["answer"], ["app"], ["caption"], ["convert"], ["publish"]):
        subprocess.run([Path(sys.executable).with_name("mue-hf"), *command, "--help"], check=True, capture_output=True)

    config = MuEConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
        token_bucket_size=16,
        image_bucket_size=8,
        backbone_config=TRUNK,
    )
    model = MuEForConditionalGeneration(config).eval()
    inputs = {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "input_ids": torch.tensor([[0, 5, 6, 2]]),
        "decoder_input_ids": torch.tensor([[0, 7]]),
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        carried = {path.name for path in Path(folder).glob("*_mue.py")}
        if carried != {path.name for path in installed.glob("model/*_mue.py")}:
            raise SystemExit(f"The checkpoint carries only {sorted(carried)} of the hub half.")
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        # products of weights that lie elsewhere in memory may differ in the last bit
        if not torch.allclose(model(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=1e-6):
            raise SystemExit("Logits differ after saving and loading.")
        loaded.generate(**{name: inputs[name] for name in ("pixel_values", "input_ids")}, max_new_tokens=4)
        if type(AutoModel.from_config(AutoConfig.from_pretrained(folder))).__name__ != "MuEModel":
            raise SystemExit("AutoModel does not make a MuEModel.")
        if "# name" not in render_card(loaded, "org/name", About()):
            raise SystemExit("The model card has no title.")
        draw_report(Image.new("RGB", (64, 64)), RECORD).save(Path(folder) / "report.png")
    print(f"The wheel of mue-hf works: {len(names(installed))} files, {installed}")


if __name__ == "__main__":
    main(sys.argv[1])
