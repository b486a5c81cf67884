"""What several tests of exits share: thresholds at which rows differ in depth, and layer calls as hooks count them."""

from collections import Counter

from mue_hf.model.layers_mue import MuEDecoderLayer, MuEEncoderLayer

# Chosen so that rows of the tiny model leave at different layers; every test that needs it checks that they do.
EXITS = {
    "image_exit_threshold": [0.27, 0.815, 2.0],
    "text_exit_threshold": [0.3, 0.76, 2.0],
    "decoder_exit_threshold": [0.66, 0.815, 0.835, 2.0],
}


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True} | kwargs
    return model.generate(**inputs, **kwargs)


def count_calls(model, run) -> Counter:
    """Rows x tokens of every layer call, by kind of layer, as forward hooks see them."""
    calls = Counter()
    streams = {16: "image", 7: "text"}

    def hook(module, args, output):
        is_decoder = isinstance(module, MuEDecoderLayer)
        name = "decoder" if is_decoder else streams.get(args[0].shape[1], "joint")
        calls[name] += args[0].shape[0] * args[0].shape[1]

    layers = [m for m in model.modules() if isinstance(m, MuEEncoderLayer | MuEDecoderLayer)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
