"""ONNX Runtime as the engine on a CPU: modules that run a graph each take the place of those that compute most.

`mue-hf export` writes the graphs. What decides stays as it is: the layer loop, exits, cache, beams and `generate`.
onnxruntime is imported when a model is loaded with an engine.
"""

import json
from functools import cache
from hashlib import sha256
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import logging

from .cache_mue import MuECache
from .graph_files_mue import FOLDER, LINEAR, MANIFEST, engine_fingerprint, graph_names, read_manifest
from .layers_mue import MuEOutputHead, mask_value
from .views_mue import ImageView, TokenView

logger = logging.get_logger(__name__)

ENGINES = ("onnxruntime",)
# Decoder layers of fewer states than this take one thread: a second one costs more than it saves.
FEW_STATES = 512
# Tokens of a stream in one call of an encoder layer; more of them take turns by row, since more at once would need
# memory and save no time.
MOST_TOKENS = 1024
# What `config._attn_implementation` is under an engine, which has no other attention to choose.
ATTENTION = "onnxruntime"


def load_onnxruntime() -> Any:
    """The module.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            f"`engine=\"onnxruntime\"` needs the extra `export` ({error}): pip install 'mue-hf[export]'"
        ) from error


def cpu_has_bf16() -> bool:
    """Whether oneDNN computes in bfloat16 on this CPU. Where it emulates it, products can take more than ten times
    as long as in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _share_arena() -> None:
    """Sessions of this process take their memory from one arena: with one each, a large batch fills the machine."""
    runtime = load_onnxruntime()
    kind, use = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, runtime.OrtMemType.DEFAULT
    try:
        runtime.create_and_register_allocator(runtime.OrtMemoryInfo("Cpu", kind, 0, use), None)
    except RuntimeError as error:
        # another copy of this file, in a checkpoint, was first
        if "already" not in str(error):
            raise


class Engine:
    """The sessions of one model, made when they are first needed, and made anew for another number of threads.

    Args:
        folder (`Path`): of the graphs.
        manifest (`dict`): see [`read_manifest`].
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.graphs, self.options = folder, manifest["graphs"], manifest["session_options"]
        self.precision = manifest["precision"]
        if self.graphs.get("trunk", {}).get("precision") == "int8":
            self.precision += " with its trunk"
        # of what the encoder's attention computes in torch
        self.attention = getattr(torch, manifest["attention"])
        if self.attention != torch.float32:
            self.precision += f", attention in {manifest['attention']}"
            if not cpu_has_bf16():
                logger.warning(
                    f"{folder} was exported with --bfloat16-attention, but this CPU has no instructions for bfloat16: "
                    "it computes the same more slowly; export without it for CPUs like this one."
                )
        self.digest = sha256(json.dumps([manifest["weights"], self.graphs], sort_keys=True).encode()).hexdigest()
        self.weights, self.fingerprint = manifest["fingerprint"], engine_fingerprint(manifest)
        # what the names of graphs begin with that take one thread
        self.threads = 0
        self.single: tuple[str, ...] = ()
        self.sessions: dict[str, tuple[Any, list[str], list[str]]] = {}

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Runs a graph on CPU tensors, its inputs in their order.

        Raises:
            ValueError: if an input needs a gradient.
        """
        if torch.get_num_threads() != self.threads:
            self.threads = torch.get_num_threads()
            self.sessions.clear()
        if name not in self.sessions:
            self.sessions[name] = self._session(name)
        session, names, outputs = self.sessions[name]
        try:
            feed = {key: value.contiguous().numpy() for key, value in zip(names, inputs, strict=True)}
        except RuntimeError as error:
            if not any(value.requires_grad for value in inputs):
                raise
            raise ValueError(
                'gradients do not flow through `engine="onnxruntime"`, but an input needs one; load the model without '
                "`engine`, or detach the input."
            ) from error
        return [torch.from_numpy(value) for value in session.run(outputs, feed)]

    def _session(self, name: str) -> tuple[Any, list[str], list[str]]:
        runtime = load_onnxruntime()
        _share_arena()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1 if name.startswith(self.single) else self.threads
        options.inter_op_num_threads = 1
        for key, value in self.options.items():
            options.add_session_config_entry(key, value)
        path = str(self.folder / self.graphs[name]["file"])
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session, *([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def __getstate__(self) -> dict[str, Any]:
        """Sessions are not copied: a copy makes its own."""
        return vars(self) | {"threads": 0, "sessions": {}}


class EngineGuard:
    """A module that may run on an engine, and then stays where it is. `engine` is the [`Engine`], None without one."""

    engine: Engine | None = None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # what `.to()`, `.half()` and the like do to each tensor
        if self.engine is not None:
            moved = fn(torch.zeros(1))
            if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
                self._refuse(f"`.to()` with {moved.device}, {moved.dtype}")
        return super()._apply(fn, *args, **kwargs)

    def _refuse(self, what: str, remedy: str = "load the model without `engine`.") -> None:
        if self.engine is not None:
            raise ValueError(
                f'{what} is not possible with `engine="onnxruntime"`, which holds the weights in its graphs, in '
                f"float32 or int8 on the CPU; {remedy}"
            )


class EngineLinear(nn.Module):
    """Takes the place of a linear layer."""

    def __init__(self, engine: Engine, graph: str, layer: nn.Linear):
        super().__init__()
        self.engine, self.graph = engine, graph
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, states: Tensor) -> Tensor:
        return self.engine.run(self.graph, states.flatten(0, -2))[0].unflatten(0, states.shape[:-1])


class EngineEncoderLayer(nn.Module):
    """Takes the place of a `MuEEncoderLayer`: a graph up to its attention and one behind it. Attention is torch's,
    which goes through the scores block by block, where a graph would hold all of them at once."""

    def __init__(self, engine: Engine, index: int, heads: int):
        super().__init__()
        self.engine, self.graph, self.heads = engine, f"encoder_{index}", heads
        self.projection = f"{self.graph}_project"

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        at_once = max(1, MOST_TOKENS // hidden_states.shape[1])
        # one bias of all rows, or one each
        biases = repeat(position_bias) if len(position_bias) == 1 else position_bias.split(at_once)
        states = [self._run(*part) for part in zip(hidden_states.split(at_once), biases, strict=False)]
        return torch.cat(states) if len(states) > 1 else states[0]

    def _run(self, states: Tensor, bias: Tensor) -> Tensor:
        dtype = self.engine.attention
        joined = self.engine.run(self.projection, states)[0].to(dtype)
        query, keys, values = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # queries are scaled in the graph
        attended = nn.functional.scaled_dot_product_attention(query, keys, values, bias.to(dtype), scale=1.0)
        return self.engine.run(self.graph, states, attended.transpose(1, 2).flatten(2).float())[0]


class EngineKeysValues(nn.Module):
    """Takes the place of `MuEAttention.keys_values` of a cross-attention."""

    def __init__(self, engine: Engine, index: int):
        super().__init__()
        self.engine, self.graph = engine, f"cross_{index}"

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states [images, source, d] -> keys and values [images, heads, source, head dim]."""
        keys, values = self.engine.run(self.graph, states)
        return keys, values


class EngineDecoderLayer(nn.Module):
    """Takes the place of a `MuEDecoderLayer`: one graph for all of it, one for the keys and values of the image, and
    one for those of tokens that skipped the layer."""

    def __init__(self, engine: Engine, index: int, heads: int):
        super().__init__()
        self.engine, self.layer_idx, self.heads = engine, index, heads
        self.graph, self.projection = f"decoder_{index}", f"decoder_{index}_project"
        self.cross_attn = EngineKeysValues(engine, index)

    def project_self(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """See `MuEDecoderLayer`."""
        keys, values = self.engine.run(self.projection, states)
        return keys, values

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        self_bias: Tensor,
        cross_bias: Tensor,
        tokens: TokenView,
        images: ImageView,
        cache: MuECache | None = None,
        output_attentions: bool = False,
    ) -> Tensor:
        """See `MuEDecoderLayer`; `output_attentions` was refused before."""
        rows, num_tokens, width = hidden_states.shape
        past = None
        if cache is None:
            cross_keys, cross_values = self.cross_attn(encoder_hidden_states)
        else:
            past = cache.past_self(self.layer_idx, tokens, self.project_self)
            cross_keys, cross_values = cache.cross(
                self.layer_idx, self.cross_attn, encoder_hidden_states, images.images
            )
        if past is None:
            past = (hidden_states.new_empty(rows, self.heads, 0, width // self.heads),) * 2
        if tokens.fold is not None:
            # each token is a row by itself
            positions, absent = (keys.view(rows, 1, 1, -1) for keys in tokens.keys[:2])
            self_bias = tokens.fold.unfold_weights((self_bias,))
            self_bias = self_bias.gather(-1, positions.expand(-1, self.heads, -1, -1))
            self_bias = self_bias.masked_fill(absent, mask_value(self_bias))
        if images.images is not None:
            # neighbours are a view, others are copied
            of = images.runs[0][1] if len(images.runs) == 1 else images.images
            cross_keys, cross_values = cross_keys[of], cross_values[of]
        fold, unfold = images.places(num_tokens)
        states, keys, values = self.engine.run(
            self.graph,
            *(hidden_states, *past, tokens.own(rows, num_tokens), self_bias),
            *(cross_keys, cross_values, fold, cross_bias, unfold),
        )
        if cache is not None:
            cache.extend_self(self.layer_idx, keys, values, tokens)
        return states


class EngineTrunk(nn.Module):
    """Takes the place of the image trunk; of an exported image size where the trunk does not allow others."""

    def __init__(self, engine: Engine):
        super().__init__()
        graph = engine.graphs["trunk"]
        self.engine, self.image_size, self.channels = engine, graph.get("image_size"), [graph["channels"]]

    def forward(self, pixels: Tensor) -> BackboneOutput:
        if self.image_size is not None and list(pixels.shape[2:]) != self.image_size:
            raise ValueError(
                f"`pixel_values` must have the image size that the trunk was exported for, {self.image_size}, got "
                f"{list(pixels.shape[2:])}; resize the images, or export with `--image-size`."
            )
        # one image a call: what the first convolutions of several images give is more than a CPU's caches hold
        maps = [self.engine.run("trunk", image)[0] for image in pixels.split(1)]
        return BackboneOutput(feature_maps=(torch.cat(maps) if len(maps) > 1 else maps[0],))


class EngineHead(EngineGuard, MuEOutputHead):
    """Takes the place of the output head for all tokens that texts have. The matrix is that of the token embeddings:
    a few rows of it (`ids`, candidates of exits) are multiplied by torch.

    Args:
        head (`MuEOutputHead`): whose weights it shares.
        num_text_tokens (`int`): rows in the graph.
    """

    def __init__(self, engine: Engine, head: nn.Module, num_text_tokens: int):
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.engine, self.num_text_tokens = engine, num_text_tokens

    def forward(self, states: Tensor, ids: slice | Tensor | None = None) -> Tensor:
        text = slice(0, self.num_text_tokens)
        if isinstance(ids, Tensor) or (ids or slice(0, self.out_features)) != text:
            return super().forward(states, ids)
        some = self.engine.run("head", states.flatten(0, -2))[0].unflatten(0, states.shape[:-1])
        if self.num_text_tokens == self.out_features:
            return some
        logits = some.new_full((*some.shape[:-1], self.out_features), -torch.inf)
        logits[..., text] = some
        return logits


class EngineMixin(EngineGuard):
    """A model that may run on an engine, and what else it then refuses."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, engine: str | None = None, **kwargs: Any
    ) -> Any:
        """Loads the model.

        Args:
            engine (`str`, *optional*): "onnxruntime" runs the graphs that `mue-hf export` wrote to this folder, or to
                one that was uploaded to the Hub.

        Raises:
            ValueError: for an engine that does not exist or is not installed, a folder or repository without its
                graphs or with others than its manifest says, and options that belong to torch.
        """
        if engine is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {list(ENGINES)} or None, got {engine!r}; drop it for torch.")
        _check_options(kwargs)
        load_onnxruntime()
        folder = _local_folder(pretrained_model_name_or_path, kwargs)
        manifest = read_manifest(folder)
        kwargs["dtype"], running = torch.float32, Engine(folder / FOLDER, manifest)
        # the class takes it behind its config; weights that graphs hold are not read then
        loaded = super().from_pretrained(folder, running, *args, **kwargs)
        _finish(loaded[0] if isinstance(loaded, tuple) else loaded, running)
        return loaded

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._refuse("training")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("`save_pretrained`", "copy the folder, or load the model without `engine`.")
        super().save_pretrained(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("`state_dict`")
        return super().state_dict(*args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("`set_attn_implementation`")
        super().set_attn_implementation(*args, **kwargs)


def _local_folder(name: Any, options: dict[str, Any]) -> Path:
    """The folder of a checkpoint: itself, or what the cache of the Hub holds of a repository, downloaded where needed.
    Options that say which are taken out: what is loaded is one state of the repository.

    Raises:
        ValueError: if the Hub does not give it.
    """
    if Path(name).is_dir():
        return Path(name, options.pop("subfolder", ""))
    subfolder = options.pop("subfolder", "")
    where = {key: options.pop(key) for key in ("cache_dir", "force_download", "revision", "token") if key in options}
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}{ending}" for ending in ("*.json", "*.safetensors", f"{FOLDER}/*")]
    local = options.get("local_files_only", False)
    try:
        root = snapshot_download(str(name), allow_patterns=patterns, local_files_only=local, **where)
    # what huggingface_hub and the network raise
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f'`engine="onnxruntime"` needs a folder that `mue-hf export CKPT DIR` wrote, or a repository of the Hub '
            f"with its files, got {str(name)!r}: {reason}; check the name, or pass a folder."
        ) from error
    return Path(root, subfolder)


def _check_options(options: dict[str, Any]) -> None:
    """Raises a ValueError for options of loading that an engine cannot follow."""
    allowed = {
        "dtype": (None, "auto", "float32", torch.float32),
        "torch_dtype": (None, "auto", "float32", torch.float32),
        "device_map": (None, "cpu"),
        "attn_implementation": (None,),
        "quantization_config": (None,),
    }
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            raise ValueError(
                f'`{name}` must be left out with `engine="onnxruntime"`, which runs float32 or int8 graphs on the '
                f"CPU, got {options[name]!r}; drop one of them."
            )
        options.pop(name, None)


def exchange_modules(model: Any, engine: Engine) -> None:
    """Puts modules that run graphs in the place of the layers, the head and the trunk of a model.

    Raises:
        ValueError: if the manifest lacks a graph that this model needs.
    """
    config, graphs = model.config, engine.graphs
    if missing := [name for name in graph_names(config) if name not in graphs]:
        raise ValueError(
            f"{engine.folder / MANIFEST} must list the graph {missing[0]!r} of this model, got {sorted(graphs)}; run "
            "`mue-hf export` again, with --overwrite."
        )
    engine.single = ("decoder_",) if config.d_model < FEW_STATES else ()
    encoder, decoder = model.get_encoder(), model.get_decoder()
    for stack, names in ((encoder, LINEAR["encoder"]), (decoder, LINEAR["decoder"])):
        for name in names:
            setattr(stack, name, EngineLinear(engine, name, getattr(stack, name)))
    encoder.layers = nn.ModuleList(
        [EngineEncoderLayer(engine, number, config.encoder_attention_heads) for number in range(config.encoder_layers)]
    )
    heads = config.decoder_attention_heads
    decoder.layers = nn.ModuleList(
        [EngineDecoderLayer(engine, number, heads) for number in range(config.decoder_layers)]
    )
    held = [r"\.layers\.", *(rf"\.{name}\." for names in LINEAR.values() for name in names)]
    if "trunk" in graphs:
        encoder.embed_images = EngineTrunk(engine)
        held.append(r"\.embed_images\.")
    # transformers' name for weights that are in the files and not read
    model._keys_to_ignore_on_load_unexpected = held
    model.lm_head = EngineHead(engine, model.lm_head, config.num_text_tokens)
    config._attn_implementation_internal = ATTENTION


def use_engine(model: Any, folder: Path, manifest: dict[str, Any]) -> None:
    """Lets a model that is loaded run on an engine from now on, its folder that of the graphs; its weights go.

    Raises:
        ValueError: see [`exchange_modules`].
    """
    engine = Engine(folder, manifest)
    exchange_modules(model, engine)
    _finish(model, engine)


def _finish(model: Any, engine: Engine) -> None:
    model.eval().requires_grad_(False)
    for module in (model, model.model, model.get_encoder(), model.get_decoder()):
        module.engine = engine
    # until now that of the weights in torch
    model._fingerprint = None


__all__ = [
    "ATTENTION",
    "ENGINES",
    "Engine",
    "EngineDecoderLayer",
    "EngineEncoderLayer",
    "EngineGuard",
    "EngineHead",
    "EngineKeysValues",
    "EngineLinear",
    "EngineMixin",
    "EngineTrunk",
    "cpu_has_bf16",
    "exchange_modules",
    "load_onnxruntime",
    "use_engine",
]
