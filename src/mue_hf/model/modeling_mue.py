"""The models: `MuEModel` (encoder and decoder) and `MuEForConditionalGeneration` (with the tied output head)."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import auto_docstring, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .agreement_mue import check_answers
from .cache_mue import MuECache
from .configuration_mue import MuEConfig
from .criteria_mue import ExitPolicy
from .decoder_mue import MuEDecoder, MuEDecoderOutput
from .early_exit_mue import ExitRecord
from .encoder_mue import MuEEncoder, MuEEncoderOutput
from .engine_mue import Engine, EngineGuard, EngineMixin, EngineTrunk, exchange_modules
from .exit_options_mue import (
    CHECKPOINT_OPTIONS,
    CONFIG_NAMES,
    ExitOptions,
    check_names,
    check_no_search,
    resolve_options,
)
from .generation_mue import MuEGenerationMixin
from .layers_mue import CandidateHead, MuEAttention, MuEOutputHead
from .presets_mue import PresetCheckMixin
from .vision_mue import trunk_features

# What transformers passes to any model beside its own inputs.
PASSED_BY_TRANSFORMERS = frozenset({"num_items_in_batch", "return_dict"})


@dataclass
class MuEModelOutput(ExitRecord, Seq2SeqModelOutput):
    r"""Output of `MuEModel`; see [`ExitRecord`] for exits.

    Args:
        encoder_attention_mask (`torch.BoolTensor` of shape `(batch_size, source_length)`):
            Source positions that exist, image then text. Only when exits were asked for.
    """

    encoder_attention_mask: torch.BoolTensor | None = None


@dataclass
class MuESeq2SeqLMOutput(ExitRecord, Seq2SeqLMOutput):
    r"""Output of `MuEForConditionalGeneration`; see [`ExitRecord`] for exits.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, target_length, vocab_size)`):
            Of the next token, from each row's exit state.
    """


def shift_tokens_right(labels: Tensor, pad_token_id: int, start_token_id: int) -> Tensor:
    """Decoder input [batch, length] for labels: the start token, then all but the last label; -100 becomes padding."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start_token_id), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


@auto_docstring
class MuEPreTrainedModel(PreTrainedModel):
    config: MuEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MuEEncoderLayer", "MuEDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    # the additive position bias has no place in these kernels
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Sets the attention of encoder and decoder; the trunk keeps its own unless a dict names `backbone_config`."""
        requested = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if "" in requested:
            self.config._attn_implementation_internal = self._check_and_adjust_attn_implementation(
                requested[""], is_init_check=False, allow_all_kernels=allow_all_kernels
            )
        if "backbone_config" in requested:
            self.base_model.encoder.embed_images.set_attn_implementation(
                requested["backbone_config"], allow_all_kernels
            )

    def _init_weights(self, module: nn.Module) -> None:
        # the trunk initialises itself, by its own rules
        if isinstance(module, PreTrainedModel) and not isinstance(module, MuEPreTrainedModel):
            return
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # OFA's padding row is not zero either: it is tied to the output head
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MuEAttention):
            init.ones_(module.c_attn)


@auto_docstring(custom_intro="Encoder and decoder without an output head.")
class MuEModel(EngineGuard, MuEPreTrainedModel):
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: MuEConfig, engine: Engine | None = None):
        r"""
        engine ([`Engine`], *optional*):
            What runs trunk, layers and head in the place of torch; `from_pretrained` makes it.
        """
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        trunk = EngineTrunk(engine) if engine is not None and "trunk" in engine.graphs else None
        self.encoder = MuEEncoder(config, trunk)
        self.decoder = MuEDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> MuEEncoder:
        return self.encoder

    def get_decoder(self) -> MuEDecoder:
        return self.decoder

    def trunk_features(self, pixel_values: Tensor) -> Tensor:
        """The trunk's features [batch, channels, rows, columns] of pixels [batch, 3, height, width], which `forward`
        and `generate` take as `image_features`: cache them while the trunk is frozen."""
        return trunk_features(self.encoder.embed_images, pixel_values)

    def fold_batch_norms(self) -> int:
        """Folds the trunk's batch norms into the convolutions before them: the same features to rounding, faster.
        `train()`, saving and loading weights undo it; fingerprints are those of the weights before.

        Folds in place; in half precision, with offloaded weights or without batch norms it does nothing.

        Returns:
            `int`: how many batch norms are folded now.

        Raises:
            ValueError: in training mode.
        """
        return self.encoder.fold_batch_norms()

    def unfold_batch_norms(self) -> None:
        """Undoes `fold_batch_norms`.

        Raises:
            ValueError: if a folded weight was written to, which would be lost.
        """
        self.encoder.unfold_batch_norms()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MuEEncoderOutput | None = None,
        cache: MuECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_exit_layers: bool | None = None,
        exit_step: int | None = None,
        exit_num_steps: int | None = None,
        exit_policy: ExitPolicy | None = None,
        exit_options: ExitOptions | None = None,
        active_rows: torch.BoolTensor | None = None,
        predict: Any = None,
        **kwargs: Any,
    ) -> MuEModelOutput:
        r"""
        patch_mask (`torch.BoolTensor` of shape `(images,)`, *optional*):
            False where a sample has no image; its pixels are ignored.
        image_features (`torch.FloatTensor` of shape `(images, channels, rows, columns)`, *optional*):
            The trunk's last feature map, in place of `pixel_values` (see `trunk_features`).
        decoder_input_ids (`torch.LongTensor` of shape `(rows, target_length)`):
            Several decoder rows per encoded sample are allowed: row r belongs to sample r // (rows // batch).
        output_exit_layers (`bool`, *optional*):
            Whether to return exit depths and the executed-layer record. Default: whether exit options were passed.
        exit_step (`int`, *optional*):
            The decoding step t of Theta(t), from 0. Default: the position of the last new token.
        exit_num_steps (`int`, *optional*):
            N of Theta(t), the greatest number of new tokens. Default: what the generation config allows.
        exit_policy (`ExitPolicy`, *optional*):
            The decoder's policy at this step, as `generate` passes it, in place of the decoder's exit options.
        exit_options (`ExitOptions`, *optional*):
            All exit options, in place of those by name.
        active_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Decoder rows that are worth running; the others have depth 0.
        predict (`Callable`, *optional*):
            Normalised decoder states (rows, d_model) -> logits, for criteria that look at the output. Default: the
            tied embedding matrix, of it the rows of `exit_candidates`.
        kwargs (*optional*):
            The exit options of [`ExitOptions`] by name, e.g. `decoder_exit_threshold=0.95`.
        """
        options = exit_options or self.exit_options_of(kwargs, {})
        if output_exit_layers is None:
            output_exit_layers = options is not None
        options = options or ExitOptions()
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        wanted = {name: getattr(self.config, name) if value is None else value for name, value in wanted.items()}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                patch_mask=patch_mask,
                image_features=image_features,
                inputs_embeds=inputs_embeds,
                exit_options=options,
                output_exit_layers=output_exit_layers,
                **wanted,
            )
        encoded = _checked(encoder_outputs)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full((encoded.shape[0], 1), start, device=encoded.device)
        num_tokens = (decoder_inputs_embeds if decoder_input_ids is None else decoder_input_ids).shape[1]
        cache = self._cache(cache, use_cache, options, num_tokens)
        if exit_policy is None:
            last = (0 if cache is None else cache.length) + num_tokens - 1
            exit_policy = options.policy("decoder", self.config.decoder_layers).at_step(
                last if exit_step is None else exit_step, exit_num_steps or self.config.max_position_embeddings
            )
        decoder_outputs = self.decoder(
            encoder_outputs,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            cache=cache,
            active_rows=active_rows,
            policy=exit_policy,
            predict=predict or self._tied_head(options),
            **wanted,
        )
        return _joined(encoder_outputs, decoder_outputs, output_exit_layers)

    def _tied_head(self, options: ExitOptions) -> Any:
        ids = options.exit_candidates
        return lambda states: nn.functional.linear(
            states, self.shared.weight if ids is None else self.shared.weight[list(ids)]
        )

    def exit_options_of(self, kwargs: dict[str, Any], saved: dict[str, Any]) -> ExitOptions | None:
        """The exit options among the keyword arguments of `forward`, None without any; of those that are `saved` with
        the model, presets and candidate tokens alone count.

        Raises:
            ValueError: for options that `ExitOptions` refuses, and for keyword arguments that nobody reads.
        """
        names = CONFIG_NAMES - {"exit_presets"}
        check_names(kwargs, names)
        if unknown := sorted(kwargs.keys() - names - PASSED_BY_TRANSFORMERS):
            near = difflib.get_close_matches(unknown[0], signature(self.forward).parameters, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "drop it."
            raise ValueError(f"`{unknown[0]}` must be an input of the model, which it is not; {hint}")
        given = {name: value for name, value in kwargs.items() if name in names and value is not None}
        if not given:
            return None
        check_no_search(given, "forward")
        kept = {name: saved[name] for name in ("exit_presets", *CHECKPOINT_OPTIONS) if saved.get(name)}
        options = resolve_options(given, {}, kept, self.config)
        check_answers(options.exit_fit, None)
        return options

    def _cache(
        self,
        cache: MuECache | None,
        use_cache: bool | None,
        options: ExitOptions,
        num_tokens: int,
    ) -> MuECache | None:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is not None:
            if not hasattr(cache, "kv_policy"):
                raise ValueError(
                    f"`cache` must be a MuECache, got {type(cache).__name__}; "
                    "other caches cannot hold tokens that skipped layers."
                )
            return cache
        if not use_cache or (self.training and torch.is_grad_enabled()):
            return None
        return MuECache(self.config, max(num_tokens, 32), options.exit_kv)


def _checked(encoder_outputs: MuEEncoderOutput) -> Tensor:
    """The encoder's states [samples, source, d].

    Raises:
        ValueError: if the output is not that of a MuE encoder.
    """
    if getattr(encoder_outputs, "position_embeddings", None) is None:
        raise ValueError(
            "`encoder_outputs` must be what `model.get_encoder()(...)` returned: the decoder needs its mask and "
            f"position embeddings, got {type(encoder_outputs).__name__}."
        )
    return encoder_outputs.last_hidden_state


def _joined(encoder: MuEEncoderOutput, decoder: MuEDecoderOutput, output_exit_layers: bool) -> MuEModelOutput:
    output = MuEModelOutput(
        last_hidden_state=decoder.last_hidden_state,
        cache=decoder.cache,
        decoder_hidden_states=decoder.hidden_states,
        decoder_attentions=decoder.attentions,
        cross_attentions=decoder.cross_attentions,
        encoder_last_hidden_state=encoder.last_hidden_state,
        encoder_hidden_states=encoder.hidden_states,
        encoder_attentions=encoder.attentions,
    )
    if output_exit_layers:
        output.encoder_attention_mask = encoder.attention_mask
        output.image_exit_layers, output.text_exit_layers = encoder.image_exit_layers, encoder.text_exit_layers
        output.decoder_exit_layers = decoder.decoder_exit_layers
        output.executed_layers = {**(encoder.executed_layers or {}), **decoder.executed_layers}
    return output


@auto_docstring(custom_intro="MuE with its tied output head: captions, closed answers, and fine-tuning.")
class MuEForConditionalGeneration(EngineMixin, PresetCheckMixin, MuEPreTrainedModel, MuEGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}

    def __init__(self, config: MuEConfig, engine: Engine | None = None):
        r"""
        engine ([`Engine`], *optional*):
            What runs trunk, layers and head in the place of torch; `from_pretrained` makes it.
        """
        super().__init__(config)
        self.model = MuEModel(config, engine)
        self.lm_head = MuEOutputHead(config.d_model, config.vocab_size, bias=False)
        # A generation config marked as made from a model config would lose exit options and presets on loading.
        self.generation_config._from_model_config = False
        if engine is not None:
            exchange_modules(self, engine)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> MuEEncoder:
        return self.model.get_encoder()

    def get_decoder(self) -> MuEDecoder:
        return self.model.get_decoder()

    def trunk_features(self, pixel_values: Tensor) -> Tensor:
        """See [`MuEModel.trunk_features`]."""
        return self.model.trunk_features(pixel_values)

    def fold_batch_norms(self) -> int:
        """See [`MuEModel.fold_batch_norms`]."""
        return self.model.fold_batch_norms()

    def unfold_batch_norms(self) -> None:
        """See [`MuEModel.unfold_batch_norms`]."""
        self.model.unfold_batch_norms()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder input [batch, length] that predicts labels [batch, length]."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MuEEncoderOutput | None = None,
        cache: MuECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_exit_layers: bool | None = None,
        exit_step: int | None = None,
        exit_num_steps: int | None = None,
        exit_policy: ExitPolicy | None = None,
        active_rows: torch.BoolTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        emitted_ids: slice | torch.LongTensor | None = None,
        predict: Any = None,
        **kwargs: Any,
    ) -> MuESeq2SeqLMOutput:
        r"""
        patch_mask (`torch.BoolTensor` of shape `(images,)`, *optional*):
            False where a sample has no image; its pixels are ignored.
        image_features (`torch.FloatTensor` of shape `(images, channels, rows, columns)`, *optional*):
            The trunk's last feature map, in place of `pixel_values` (see `trunk_features`).
        labels (`torch.LongTensor` of shape `(rows, target_length)`, *optional*):
            Target tokens; -100 is ignored. Without `decoder_input_ids` they also make the decoder's input.
        output_exit_layers (`bool`, *optional*):
            Whether to return exit depths and the executed-layer record. Default: whether exit options were passed.
        exit_step (`int`, *optional*):
            The decoding step t of Theta(t), from 0. Default: the position of the last new token.
        exit_num_steps (`int`, *optional*):
            N of Theta(t), the greatest number of new tokens. Default: what the generation config allows.
        exit_policy (`ExitPolicy`, *optional*):
            The decoder's policy at this step, as `generate` passes it, in place of the decoder's exit options.
        active_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Decoder rows that are worth running; the others have depth 0.
        emitted_ids (`slice` or `torch.LongTensor`, *optional*):
            Token ids whose logits are wanted, as `generate` passes them; those of the others are -inf.
        predict (`Callable`, *optional*):
            Normalised decoder states (rows, d_model) -> logits, for criteria that look at the output, as `generate`
            passes it. Default: the output head, of it the rows of `exit_candidates`.
        kwargs (*optional*):
            The exit options of [`ExitOptions`] by name, e.g. `decoder_exit_threshold=0.95`.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        limits = self.generation_config
        options = self.model.exit_options_of(kwargs, vars(limits))
        if predict is None:
            predict = self._exit_head(options and options.exit_candidates)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            patch_mask=patch_mask,
            image_features=image_features,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_exit_layers=output_exit_layers,
            exit_step=exit_step,
            exit_num_steps=exit_num_steps or limits.max_new_tokens or limits.max_length,
            exit_policy=exit_policy,
            exit_options=options,
            active_rows=active_rows,
            predict=predict,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(outputs.last_hidden_state[:, keep], emitted_ids)
        loss = None
        if labels is not None:
            options = {"vocab_size": self.config.vocab_size, "num_items_in_batch": kwargs.get("num_items_in_batch")}
            loss = self.loss_function(logits=logits, labels=labels, shift_labels=labels, **options)
        fields = MuESeq2SeqLMOutput.__dataclass_fields__
        shared = {name: value for name, value in outputs.items() if name in fields}
        return MuESeq2SeqLMOutput(loss=loss, logits=logits, **shared)

    def _exit_head(self, tokens: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
        """What criteria look at: states (rows, d_model) -> the logits of `tokens`, of all for None."""
        return CandidateHead(self.lm_head, None if tokens is None else torch.tensor(tokens))

    def _logits(self, states: Tensor, ids: slice | Tensor | None) -> Tensor:
        if ids is None:
            return self.lm_head(states)
        if getattr(self.lm_head, "takes_ids", False):
            return self.lm_head(states, ids)
        # a head that was resized or replaced
        logits = self.lm_head(states)
        kept = torch.full_like(logits, -torch.inf)
        kept[..., ids] = logits[..., ids]
        return kept


__all__ = [
    "MuEForConditionalGeneration",
    "MuEModel",
    "MuEModelOutput",
    "MuEPreTrainedModel",
    "MuESeq2SeqLMOutput",
    "shift_tokens_right",
]
